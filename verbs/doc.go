// Package verbs is the vocabulary of RDMA verbs: interfaces and value types, no code that moves data.
//
// A provider (verbs/softroce today) implements it; everything above imports only this package. The
// words are those of ib_verbs and libibverbs: a [Device] has protection domains ([PD]), memory
// regions ([MR]), completion queues ([CQ]), shared receive queues ([SRQ]) and queue pairs ([QP]);
// work requests ([SendWR], [RecvWR]) are posted in batches and work completions ([WC]) are polled in
// batches. Connection management (the IB CM with RDMA-CM's private data header) is part of it:
// [Device.Listen], [Device.Connect].
//
// # Concurrency
//
// Every method may be called from any goroutine unless it says otherwise. Methods marked "may wait"
// must not be called from a completion handler, a connect handler or an async handler.
//
// # Handlers
//
// A CQ's handler runs with no provider lock held, once per CQ per receive batch, never concurrently
// with itself, never on the stack of a post or a modify. It may poll, post, arm, put references and
// start the move of a QP to ERR ([QP.SetError]). It may not wait.
//
// # Ownership
//
// Whoever opened closes. Closing a parent with live children is [ErrBusy], names them and changes
// nothing. Close returns nil the second time. The memory a posted work request names belongs to the
// QP until the completion of that request (or of a later one of the same queue) has been polled.
//
// # Limitations
//
// Reliable connected (RC) and unreliable datagram (UD) service only. One port, one P_Key (0xFFFF).
package verbs
