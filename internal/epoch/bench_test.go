package epoch

import (
	"fmt"
	"runtime"
	"sync"
	"testing"
)

// BenchmarkEpochEnterExit measures one Enter and Exit of each of n participants that run side by
// side; ns/op is per participant, and should not depend on n as long as there are cores.
func BenchmarkEpochEnterExit(b *testing.B) {
	for _, n := range []int{1, 2} {
		b.Run(fmt.Sprintf("participants=%d", n), func(b *testing.B) {
			if n > runtime.GOMAXPROCS(0) {
				b.Skipf("%d processors", runtime.GOMAXPROCS(0))
			}
			b.ReportAllocs()
			d := NewDomain()
			var wg sync.WaitGroup
			for i := range n {
				p := d.Register(fmt.Sprint("reader ", i))
				wg.Go(func() {
					defer p.Unregister()
					for range b.N {
						p.Enter()
						p.Exit()
					}
				})
			}
			wg.Wait()
			if err := d.Close(); err != nil {
				b.Fatal(err)
			}
		})
	}
}
