module github.com/nkv-store/nkv/clients/go

go 1.22
