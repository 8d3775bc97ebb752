package epoch

import (
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
)

// BenchmarkEpochEnterExit measures one Enter and Exit of each of n participants that run side by
// side; ns/op is per participant, and should not depend on n as long as there are cores. Fenced is what
// systems without a fence for writers pay.
func BenchmarkEpochEnterExit(b *testing.B) {
	for _, n := range []int{1, 2} {
		b.Run(fmt.Sprintf("participants=%d", n), func(b *testing.B) { benchEnterExit(b, Config{}, n) })
	}
	b.Run("fenced", func(b *testing.B) { benchEnterExit(b, Config{fenced: true}, 1) })
}

func benchEnterExit(b *testing.B, cfg Config, n int) {
	if n > runtime.GOMAXPROCS(0) {
		b.Skipf("%d processors", runtime.GOMAXPROCS(0))
	}
	b.ReportAllocs()
	d := cfg.NewDomain()
	b.ResetTimer()
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
}

// BenchmarkSynchronize is the writers' side: with nobody there, with a reader that is outside, and with one that
// goes in and out on another processor.
func BenchmarkSynchronize(b *testing.B) {
	for _, who := range []string{"nobody", "outside", "busy"} {
		b.Run("reader="+who, func(b *testing.B) {
			d := NewDomain()
			var stop atomic.Bool
			var reader sync.WaitGroup
			if who != "nobody" {
				p := d.Register("reader")
				defer p.Unregister()
				if who == "busy" {
					reader.Go(func() {
						for !stop.Load() {
							p.Enter()
							p.Exit()
						}
					})
				}
			}
			for b.Loop() {
				d.Synchronize()
			}
			stop.Store(true)
			reader.Wait()
		})
	}
}
