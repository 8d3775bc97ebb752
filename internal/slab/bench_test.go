package slab

import (
	"fmt"
	"sync"
	"testing"
)

// BenchmarkAllocPut measures an Alloc and a Put; with workers=2 both take from the same stack, and
// ns/op is per worker.
func BenchmarkAllocPut(b *testing.B) {
	for _, workers := range []int{1, 2} {
		b.Run(fmt.Sprintf("workers=%d", workers), func(b *testing.B) {
			benchmark(b, workers, func(s *Slab) {
				c, err := s.Alloc(Small)
				if err != nil {
					panic(err)
				}
				c.Put()
			})
		})
	}
}

// BenchmarkAllocNFreeN measures a chunk that moves in batches.
func BenchmarkAllocNFreeN(b *testing.B) {
	for _, batch := range []int{8, 64} {
		b.Run(fmt.Sprintf("batch=%d", batch), func(b *testing.B) {
			cs := make([]*Chunk, batch)
			benchmark(b, 1, func(s *Slab) {
				if _, err := s.AllocN(Small, cs); err != nil {
					panic(err)
				}
				s.FreeN(cs)
			})
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*batch), "ns/chunk")
		})
	}
}

func benchmark(b *testing.B, workers int, op func(*Slab)) {
	b.ReportAllocs()
	s := New(Config{})
	op(s) // map the first region
	b.ResetTimer()
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for range b.N {
				op(s)
			}
		})
	}
	wg.Wait()
	if err := s.Close(); err != nil {
		b.Fatal(err)
	}
}
