// Package nkv is a client of nkv, a key-value store that notifies.
//
//	client, err := nkv.Dial(ctx, "127.0.0.1:4222")
//	if err != nil {
//		return err
//	}
//	defer client.Close()
//
//	if _, err := client.Put(ctx, "lamp.kitchen", []byte("on")); err != nil {
//		return err
//	}
//	lamps, err := client.Subscribe(ctx, "lamp") // this key and all below it, the present state first
//	if err != nil {
//		return err
//	}
//	defer lamps.Close()
//	for event := range lamps.Events() {
//		switch event := event.(type) {
//		case nkv.Update:
//			fmt.Printf("%s is %s\n", event.Key, event.Value)
//		case nkv.Gone:
//			fmt.Printf("%s is gone: %s\n", event.Key, event.Reason)
//		case nkv.Synced:
//			fmt.Printf("up to date at revision %s\n", event.Revision)
//		}
//	}
//
// # One connection
//
// A [Client] has one connection, which any number of goroutines share. No call waits for the answer to another before
// it is sent. A lost connection is made again after a random pause that grows, and every subscription with it. Changes
// that were missed are delivered as if they had just happened, deletes too ([Missed]). Nothing is delivered twice.
//
// # Limits of time
//
// Each call ends when its context does. A call whose context has no deadline ends after the request timeout
// ([WithRequestTimeout], 5 s), waiting for the connection included. The context of [Client.Subscribe], [Client.Watch]
// and [Client.WatchBranch] counts for the whole life of what they return.
//
// # Writes
//
// A write is never sent twice. If it was sent and no answer came, the error is [ErrOutcomeUnknown]. Every other error of
// a write, except [ErrRefused] with status 500, means that nothing was changed; a write that failed so is not sent later.
// [Client.Update] changes a value that others change too. Reads are repeated automatically on the next connection.
package nkv
