package softroce

import (
	"testing"
	"time"

	"github.com/openrds/openrds/internal/wire/roce"
)

// TestCloseSaysWhatIsToBeSaid: a message of the connection manager that was left to the holder of the engine role leaves before the
// engine ends.
func TestCloseSaysWhatIsToBeSaid(t *testing.T) {
	tc := newTestContextOn(t, Config{}, &scriptNet{})
	d := tc.dev
	for _, c := range []func() error{tc.qp.Close, tc.mr.Deregister, tc.pd.Close, tc.cq.Close} {
		if err := c(); err != nil {
			t.Fatal(err)
		}
	}
	d.role.Lock()
	d.sendMAD(tc.peer.Addr(), new([madBytes]byte))
	closed := make(chan error)
	go func() { closed <- d.Close() }()
	time.Sleep(10 * time.Millisecond) // it waits for the role
	d.role.Unlock()
	if err := <-closed; err != nil {
		t.Fatal(err)
	}
	tc.want("", roce.UDSendOnly, 1)
}
