package nkv

import (
	"fmt"
	"net"
	"strconv"
	"strings"
)

// defaultPort is the port of an address that names none.
const defaultPort = "4222"

// parseAddress returns the network and the address as the package net has them.
func parseAddress(text string) (network, address string, err error) {
	network, address, what := splitAddress(text)
	if what != "" {
		return "", "", &Error{Kind: ErrInvalidAddress, Message: fmt.Sprintf("address %q: %s", text, what)}
	}
	return network, address, nil
}

// splitAddress returns what is wrong with the address as its last result.
func splitAddress(text string) (network, address, what string) {
	if path, ok := strings.CutPrefix(text, "unix:"); ok {
		rest, hasHost := strings.CutPrefix(path, "//")
		switch {
		case path == "":
			return "", "", "a path must follow 'unix:'"
		case hasHost && !strings.HasPrefix(rest, "/"):
			return "", "", "write unix:" + rest + " for a relative path"
		case hasHost:
			return "unix", rest, ""
		}
		return "unix", path, ""
	}
	if strings.HasPrefix(text, "/") || strings.HasPrefix(text, ".") {
		return "unix", text, ""
	}
	if scheme, rest, ok := strings.Cut(text, "://"); ok {
		if scheme != "nkv" {
			return "", "", fmt.Sprintf("unknown scheme %q; write host:port, nkv://host:port or unix:PATH", scheme)
		}
		text = strings.TrimSuffix(rest, "/")
	}
	if strings.ContainsAny(text, "/@?# ") {
		return "", "", "only host:port is expected here"
	}
	host, port, what := splitHostPort(text)
	if what != "" {
		return "", "", what
	}
	return "tcp", net.JoinHostPort(host, port), ""
}

func splitHostPort(text string) (host, port, what string) {
	port = defaultPort
	hasPort := false
	if rest, ok := strings.CutPrefix(text, "["); ok {
		var behind string
		if host, behind, ok = strings.Cut(rest, "]"); !ok {
			return "", "", "no ']' after the IPv6 address"
		}
		if behind != "" {
			if port, hasPort = strings.CutPrefix(behind, ":"); !hasPort {
				return "", "", "':port' must follow ']'"
			}
		}
	} else if strings.Count(text, ":") > 1 {
		return "", "", "write an IPv6 address in brackets: [::1]:4222"
	} else {
		var given string
		if host, given, hasPort = strings.Cut(text, ":"); hasPort {
			port = given
		}
	}
	_, notNumber := strconv.ParseUint(host, 10, 16)
	switch {
	case host == "":
		return "", "", "the host is missing; write host:port, such as 127.0.0.1:4222"
	case hasPort && port == "":
		return "", "", "the port is missing after ':'"
	case !hasPort && notNumber == nil:
		return "", "", "the host is missing; write host:port, such as 127.0.0.1:" + host
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return "", "", "the port must be a number from 0 to 65535"
	}
	return host, port, ""
}
