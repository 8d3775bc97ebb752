package softroce

import (
	"testing"
	"time"

	"github.com/openrds/openrds/internal/wire/roce"
)

// A peer that was not ready is asked again with a handful of packets, however many were in flight: while it is not ready it throws
// all of them away. Each acknowledgement then doubles what is in flight.
func TestRNRAsksWithAHandful(t *testing.T) {
	script(t, func(tc *testContext) {
		const n = 64 << 10
		tc.post(send(1, tc.sge(0, n)))
		burst := func() (sent int, last roce.Packet) {
			for {
				pk, ok := tc.read()
				if !ok {
					return sent, last
				}
				sent, last = sent+1, pk
			}
		}
		whole, _ := burst()
		if whole < 32 {
			t.Fatalf("%d packets go out at first", whole)
		}
		var few int
		for range 2 {
			tc.write(roce.RCAck, tx(0), false, aeth(roce.SynRNR|12, 0), nil)
			time.Sleep(time.Millisecond)
			var last roce.Packet
			few, last = burst()
			if few == 0 || few > whole/2 || !last.BTH.AckReq() {
				t.Fatalf("%d packets after the RNR NAK, %d before; the last asks for an acknowledgement: %v", few, whole, last.BTH.AckReq())
			}
		}
		tc.write(roce.RCAck, tx(few-1), false, aeth(roce.SynACK, 0), nil)
		more, last := burst()
		if more < few+few/2 {
			t.Errorf("%d packets after the acknowledgement of %d", more, few)
		}
		tc.write(roce.RCAck, last.BTH.PSN(), false, aeth(roce.SynACK, 0), nil)
		for {
			sent, last := burst()
			if sent == 0 {
				break
			}
			tc.write(roce.RCAck, last.BTH.PSN(), false, aeth(roce.SynACK, 1), nil)
		}
		tc.wantWC("all of it", 1, 0)
	})
}
