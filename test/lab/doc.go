// Package lab boots Debian's stock kernel in an emulated machine and lets tests talk to it.
//
// The kernel is the judge of everything this project claims about compatibility: its rdma_rxe is the
// peer of softroce, its rds_rdma the peer of RDS. A lab needs root, apt and no hardware:
//
//	┌ network namespace, PID namespace ────────────────────────────────────┐
//	│  test binary (Main runs it again in here)           QEMU             │
//	│    softroce on 10.77.0.1 ── lab0 ──── tap lab1 ───── eth0 10.77.0.2  │
//	│                            bridge └── tap lab2 ───── (a second one)  │
//	│    Guest.Start ───────────── virtio serial port ─── agent            │
//	│    / of the host ─────────── 9p, read only ──────── / of the guest   │
//	└──────────────────────────────────────────────────────────────────────┘
//
// The guest's root is the host's file system, so every program of the host, the test binary included,
// runs in the guest; only /run is its own. Process one of the guest is the test binary again, in the role
// of the agent that starts commands and carries their input and output.
//
// The kernel comes from the package that linux-image-amd64 depends on; it is downloaded and unpacked
// into the user's cache directory, never installed. Everything a lab makes lives in its namespaces
// or in one temporary directory: when the process that Main started ends, however it ends, the
// kernel takes the guests, the bridge, the tap devices and the namespace with it.
//
// # Use
//
//	func TestMain(m *testing.M) { lab.Main(m, nil) }
//
//	func TestPing(t *testing.T) {
//		g := lab.Boot(t, lab.Config{})
//		g.Run(t, "ping", "-c1", lab.HostAddr4)
//	}
//
// Concurrency: the methods of Guest and Process may be called from any goroutine.
//
// # Limitations
//
// Linux on amd64, Debian and its derivatives. A guest is emulated, on one processor, and runs some
// twenty times slower than the host: 5 to 10 s to boot.
package lab
