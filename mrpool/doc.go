// Package mrpool hands out registered memory for RDMA: keys that a peer may use for a while, at the price of a
// work request instead of a registration.
//
// A device has one [Pools], which holds two pools named as the kernel's: "8k" for regions of up to 3 pages, "1m" for
// up to 257 (rds-protocol spec 3.10). A connection registers its queue pair with [Pools.NewQP] and maps memory there
// ([QP.Map]); memory that belongs to no connection is registered with [Pools.Register]. Both give a [Mapping], which
// is given back once, with Unmap (the key ends now) or Free (the key ends when enough has come together).
//
// # Life of a region
//
//	                        ┌───────── used again by this QP at once ────────┐
//	                        ▼                                                │
//	free ──Map: request posted──▶ mapped ──Unmap: LocalInv posted──▶ invalid, on this QP's list
//	  ▲                             │ Free                                   │ a later completion of this
//	  │                             ▼                                        │ queue proves it executed
//	  │                           freed ──flush worker: LocalInv, epoch──┐   │
//	  └──────────────── device's list ◀──────────────────────────────────┴───┘
//	  ▲
//	  │     request flushed or refused, QP gone
//	  └── recovery worker (deregister, allocate anew) ◀── stale ◀── mapped, freed, invalid
//
// A region is taken as memory is mapped, one at a time, and is back as soon as its invalidation is posted. Nothing
// waits for the completion but those who must: another QP, since only the order of one queue makes the reuse safe, and
// the owner of the memory, whom the done callback of Unmap tells.
//
// Registration, binding and invalidation requests are unsignaled. A completion of the same queue proves all before
// it: one of ours, which every few requests have, or one of the connection's ([QP.Mark], [QP.Passed]). An
// invalidation that somebody waits for is signaled. The identifiers of requests carry the region and its generation
// and are matched with the record of the request before they mean anything: a flush of an earlier life is ignored.
//
// # Ways to map
//
// The way is chosen per request by the device's capabilities and what the request offers: a window of type 2, bound
// to this QP over memory that is registered already (Request.Over); fast registration; plain registration where the
// device has neither.
//
// # Workers
//
// The flush worker of a pool invalidates what was freed, in bulk; the recovery worker replaces regions whose state is
// unknown. A worker is a goroutine that exists while there is work, holds a reference to the device meanwhile, and
// gives it back as its last act. Close cancels them, recovery first; it waits for the run in progress and for
// nothing else, then does inline what is left.
//
// # Concurrency
//
// Everything may be called from any goroutine. Map, Unmap, Free, Completion, Mark and Passed do not wait and may be
// called in completion handlers; MapWait, Register, Flush and both Close methods may wait. Lock order: QP.post (the
// right to post on the queue), QP.mu, pool.mu. Only the first is held across calls of the provider; Map takes it, so it may
// have to let another goroutine's post finish, and the rest only try it and leave their work to who has it.
//
// # Limitations
//
// A plain registration covers one contiguous piece. What is freed and not unmapped stays pinned until a threshold is
// reached or somebody calls Flush: there is no timer. Objects of a region are deregistered by recovery and Close, and
// where more are free than PoolConfig.MaxFree; the room they took in the pool is not given back to Go.
package mrpool
