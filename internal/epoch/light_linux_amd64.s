//go:build !race

#include "textflag.h"

// func storeRelease(p *atomic.Uint64, v uint64)
//
// A MOV to memory is a release on this processor (Intel SDM volume 3, 9.2.2: stores are not reordered with
// earlier loads or stores), and the call keeps the compiler from moving anything across it.
TEXT ·storeRelease(SB), NOSPLIT, $0-16
	MOVQ p+0(FP), AX
	MOVQ v+8(FP), CX
	MOVQ CX, (AX)
	RET
