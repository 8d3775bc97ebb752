package softroce

import "go.uber.org/atomic"

// counter names one of a device's counters; counterNames gives the text that Stats reports.
type counter int

const (
	cRxPackets counter = iota
	cRxTrains
	cRxPlaced // trains whose payloads the socket put where they belong
	cRxBytes
	cTxPackets
	cTxTrains
	cTxBytes
	cRxMalformed         // shorter than its headers, wrong TVer, length not a multiple of 4
	cRxNoQP              // no QP of that number, or not of that transport
	cRxBadState          // QP not in a state that takes the packet
	cRxBadSource         // not from the QP's peer address
	cRxBadPKey           //
	cRxBadQKey           // UD
	cRxBadICRC           //
	cRxBadDF             // IPv4 without DF
	cRxICRCSolved        // accepted after solving for the IPv4 identification
	cRxNoRecv            // UD without a receive request, or too long for it
	cRxCNP               //
	cRxSockDrops         // SO_RXQ_OVFL
	cTxErrors            // the socket refused a train for good
	cTxBlocked           // the socket was full
	cDupRequests         //
	cSeqNAKSent          //
	cSeqNAKRecv          //
	cRNRSent             //
	cRNRRecv             //
	cRetransmits         // request packets sent again
	cTimeouts            // retransmission timer expired
	cProbes              //
	cImpliedNAK          // a response passed a READ or atomic whose data did not come
	cRespOutOfRange      // response with a PSN that is not outstanding
	cReadReplays         //
	cAtomicReplays       //
	cReplaysDropped      // READs asked for again whose region is gone
	cReadDeferred        // READ or atomic dropped because as many as agreed were being answered
	cReadPauses          // runs of READ responses with a pause behind
	cCQOverflow          //
	cAsyncDropped        //
	cRemoteAccessErr     // NAK 0x62 sent
	cRemoteInvReq        // NAK 0x61 sent
	cRemoteOpErr         // NAK 0x63 sent
	cFlushed             //
	cCMDropped           //
	cMemoryFaults        // accesses to registered memory that was not there
	cODPFaults           // page faults raised
	cODPFaultPages       // pages they brought in
	cODPFaultErrors      // that ended with an error of the memory
	cODPHeld             // packets dropped without a word for want of a page
	cODPFlushTimeouts    // faults that were still on their way when a QP was left
	cODPInvalidations    // reports of pages taken away
	cODPInvalidatedPages // entries dropped for that
	cODPPrefetches       // ranges of AdviseMR
	cODPPrefetchedPages  // pages that came in for that
	nCounters
)

var counterNames = [nCounters]string{
	"rx_packets", "rx_trains", "rx_placed", "rx_bytes", "tx_packets", "tx_trains", "tx_bytes",
	"rx_malformed", "rx_no_qp", "rx_bad_state", "rx_bad_source", "rx_bad_pkey", "rx_bad_qkey", "rx_bad_icrc", "rx_bad_df",
	"rx_icrc_solved", "rx_no_recv", "rx_cnp", "rx_socket_drops", "tx_errors", "tx_blocked",
	"duplicate_requests", "seq_nak_sent", "seq_nak_received", "rnr_nak_sent", "rnr_nak_received", "retransmits", "timeouts", "probes",
	"implied_nak", "response_out_of_range", "read_replays", "atomic_replays", "read_replays_dropped", "read_deferred", "read_pauses", "cq_overflow", "async_events_dropped",
	"remote_access_errors", "remote_invalid_requests", "remote_operation_errors", "flushed", "cm_dropped",
	"memory_faults", "odp_faults", "odp_fault_pages", "odp_fault_errors", "odp_held", "odp_flush_timeouts", "odp_invalidations", "odp_invalidated_pages",
	"odp_prefetches", "odp_prefetched_pages",
}

// counters of a device. Written by the holder of the engine role, read by anyone.
type counters [nCounters]atomic.Uint64

func (c *counters) add(i counter, n uint64) { c[i].Add(n) }

func (c *counters) snapshot(m map[string]uint64) {
	for i := range c {
		m[counterNames[i]] = c[i].Load()
	}
}
