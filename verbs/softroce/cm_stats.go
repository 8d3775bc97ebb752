package softroce

import "go.uber.org/atomic"

// cmCounter names one of the connection manager's counters; cmCounterNames gives the text that
// Stats reports.
type cmCounter int

const (
	cmGSIBadOpcode  cmCounter = iota // packet to QP 1 that is no UD SEND Only
	cmGSIBadQKey                     //
	cmGSIBadLength                   // MAD not of 256 bytes
	cmGSINotCM                       // version, class or method
	cmQueueFull                      // MAD dropped, the worker is behind
	cmRxMADs                         // taken from the queue
	cmTxMADs                         //
	cmIgnored                        // attribute that is not for us (SIDR, LAP, APR, unknown)
	cmMalformed                      // a field that no sender may send
	cmUnmatched                      // names no connection, or one in another state
	cmREQs                           // valid, new, handed to a listener
	cmDupREQ                         //
	cmDupREP                         //
	cmDupDREQ                        //
	cmREQBadMTU                      // rejected: path MTU larger than ours
	cmREQBadPath                     // rejected: GIDs, P_Key, CMA header or transport type
	cmREQNoListener                  // rejected: nobody listens
	cmREQOverSource                  // dropped: too many unanswered from this source
	cmREQOverTotal                   // dropped: too many unanswered, or in timewait
	cmStale                          // a peer used the QPN of a live connection for a new one
	cmRejSent                        //
	cmRejReceived                    //
	cmMRASent                        //
	cmMRAReceived                    //
	cmRetransmits                    //
	cmRTURepeats                     // RTU sent again to a peer that is silent
	cmTimeouts                       // retransmissions exhausted
	cmCommEst                        // first data instead of a lost RTU
	cmEstablished                    //
	cmDisconnected                   // established connections that ended
	nCMCounters
)

var cmCounterNames = [nCMCounters]string{
	"gsi_bad_opcode", "gsi_bad_qkey", "gsi_bad_length", "gsi_not_cm",
	"cm_queue_full", "cm_rx_mads", "cm_tx_mads", "cm_ignored", "cm_malformed", "cm_unmatched",
	"cm_reqs", "cm_duplicate_req", "cm_duplicate_rep", "cm_duplicate_dreq",
	"cm_req_bad_mtu", "cm_req_bad_path", "cm_req_no_listener", "cm_req_over_source", "cm_req_over_total",
	"cm_stale", "cm_rej_sent", "cm_rej_received", "cm_mra_sent", "cm_mra_received",
	"cm_retransmits", "cm_rtu_repeats", "cm_timeouts", "cm_comm_est", "cm_established", "cm_disconnected",
}

// cmCounters of a device: added to by anyone, read by anyone.
type cmCounters [nCMCounters]atomic.Uint64

func (c *cmCounters) add(i cmCounter) { c[i].Inc() }

func (c *cmCounters) snapshot(m map[string]uint64) {
	for i := range c {
		m[cmCounterNames[i]] = c[i].Load()
	}
}
