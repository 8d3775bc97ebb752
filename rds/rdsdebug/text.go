package rdsdebug

import (
	"bufio"
	"fmt"
	"io"
	"net/netip"

	"github.com/openrds/openrds/rds"
)

// letters are rds-info's options.
var letters = []struct {
	letter byte
	item   rds.InfoItems
}{
	{'c', rds.InfoCounters}, {'k', rds.InfoSockets}, {'n', rds.InfoConnections}, {'r', rds.InfoRecv}, {'s', rds.InfoSend},
	{'t', rds.InfoRetrans}, {'I', rds.InfoIB}, {'d', rds.InfoDevices},
}

// ParseItems reads letters as rds-info's options have them: "cn" is counters and connections; d, which
// rds-info does not have, is devices. Nothing is everything.
func ParseItems(s string) (items rds.InfoItems, err error) {
next:
	for i := range len(s) {
		for _, l := range letters {
			if l.letter == s[i] {
				items |= l.item
				continue next
			}
		}
		return 0, fmt.Errorf("%q is none of c, k, n, r, s, t, I, d", s[i])
	}
	if items == 0 {
		items = rds.InfoAll
	}
	return items, nil
}

// itemLetters is the inverse of ParseItems.
func itemLetters(items rds.InfoItems) string {
	var b []byte
	for _, l := range letters {
		if items&l.item != 0 {
			b = append(b, l.letter)
		}
	}
	return string(b)
}

// WriteText prints the parts of in that items chooses in rds-info's columns (rds-protocol spec 7.6), which scripts
// know. verbose adds what its -v does.
func WriteText(w io.Writer, in *rds.Info, items rds.InfoItems, verbose bool) error {
	b := bufio.NewWriter(w)
	if items&rds.InfoCounters != 0 {
		fmt.Fprintf(b, "\nCounters:\n%25s %16s\n", "CounterName", "Value")
		for _, c := range in.Counters {
			fmt.Fprintf(b, "%25s %16d\n", c.Name, c.Value)
		}
	}
	if items&rds.InfoSockets != 0 {
		fmt.Fprintf(b, "\nRDS Sockets:\n%15s %5s %15s %5s %10s %10s %8s\n", "BoundAddr", "BPort", "ConnAddr", "CPort", "SndBuf", "RcvBuf", "Inode")
		for i := range in.Sockets {
			s := &in.Sockets[i]
			l, c := s.Local.AddrPort(), s.Connected.AddrPort()
			// There is no inode: a socket is an object of its process.
			fmt.Fprintf(b, "%15s %5d %15s %5d %10d %10d %8d\n", l.Addr(), l.Port(), unspecified(c.Addr(), l.Addr()), c.Port(), s.SendBuffer, s.ReceiveBuffer, 0)
		}
	}
	if items&rds.InfoConnections != 0 {
		fmt.Fprintf(b, "\nRDS Connections:\n%15s %15s %4s %16s %16s %4s\n", "LocalAddr", "RemoteAddr", "Tos", "NextTX", "NextRX", "Flgs")
		for _, c := range in.Connections {
			fmt.Fprintf(b, "%15s %15s %4d %16d %16d %4s\n", c.Local, c.Remote, c.TOS, c.NextTX, c.NextRX, flags(c.Flags))
		}
	}
	messages := func(item rds.InfoItems, name string, list []rds.MessageInfo) {
		if items&item == 0 {
			return
		}
		fmt.Fprintf(b, "\n%s Message Queue:\n%15s %5s %15s %5s %4s %16s %10s\n", name, "LocalAddr", "LPort", "RemoteAddr", "RPort", "Tos", "Seq", "Bytes")
		for _, m := range list {
			l, r := m.Local.AddrPort(), m.Remote.AddrPort()
			fmt.Fprintf(b, "%15s %5d %15s %5d %4d %16d %10d\n", l.Addr(), l.Port(), r.Addr(), r.Port(), m.TOS, m.Seq, m.Len)
		}
	}
	messages(rds.InfoRecv, "Receive", in.ReceiveQueue)
	messages(rds.InfoSend, "Send", in.SendQueue)
	messages(rds.InfoRetrans, "Retransmit", in.RetransQueue)
	if items&rds.InfoIB != 0 {
		fmt.Fprintf(b, "\nRDS IB Connections:\n%15s %15s %4s %3s %32s %32s\n", "LocalAddr", "RemoteAddr", "Tos", "SL", "LocalDev", "RemoteDev")
		for i := range in.IBConnections {
			c := &in.IBConnections[i]
			fmt.Fprintf(b, "%15s %15s %4d %3d %32s %32s", c.Local, c.Remote, c.TOS, c.SL, gid(c.LocalGID), gid(c.RemoteGID))
			if verbose {
				fmt.Fprintf(b, "  send_wr=%d, recv_wr=%d, send_sge=%d, rdma_mr_max=%d, rdma_mr_size=%d", c.MaxSendWR, c.MaxRecvWR, c.MaxSendSGE, c.RDMAMRMax, c.RDMAMRSize)
				fmt.Fprintf(b, ", qpn=%d, peer_qpn=%d", c.QPN, c.PeerQPN) // ours
			}
			fmt.Fprintln(b)
		}
	}
	if items&rds.InfoDevices != 0 {
		fmt.Fprintf(b, "\nRDMA Devices:\n%15s %24s %6s %6s %10s %10s %10s %10s\n", "Addr", "Name", "Refs", "QPs", "SmallPost", "SmallLive", "LargePost", "LargeLive")
		for i := range in.Devices {
			d := &in.Devices[i]
			fmt.Fprintf(b, "%15s %24s %6d %6d %10d %10d %10d %10d\n", d.Addr, d.Name, d.Refs, d.QPs, d.Small.Posted, d.Small.Live, d.Large.Posted, d.Large.Live)
		}
		fmt.Fprintf(b, "\nMemory Pools:\n%15s %4s %8s %8s %8s %8s %8s %8s %14s\n", "Addr", "Pool", "Max", "Pages", "Regions", "Mapped", "Ready", "Dirty", "PinnedBytes")
		for i := range in.Devices {
			d := &in.Devices[i]
			for _, p := range []struct {
				name string
				rds.PoolInfo
			}{{"8k", d.Pool8K}, {"1m", d.Pool1M}} {
				fmt.Fprintf(b, "%15s %4s %8d %8d %8d %8d %8d %8d %14d\n", d.Addr, p.name, p.Max, p.Pages, p.Regions, p.Mapped, p.Ready, p.Dirty, p.Pinned)
			}
		}
	}
	return b.Flush()
}

// flags are rds-info's letters: s sending, c connecting, C connected.
func flags(f uint8) string {
	b := []byte("----")
	for i, l := range []struct {
		bit    uint8
		letter byte
	}{{rds.ConnSending, 's'}, {rds.ConnConnecting, 'c'}, {rds.ConnConnected, 'C'}} {
		if f&l.bit != 0 {
			b[i] = l.letter
		}
	}
	return string(b)
}

// unspecified is a, or the wildcard of the family of like where there is none.
func unspecified(a, like netip.Addr) netip.Addr {
	switch {
	case a.IsValid():
		return a
	case like.Is4():
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// gid is an address as a GID is written, "::" if there is none.
func gid(a netip.Addr) string {
	if !a.IsValid() {
		return "::"
	}
	if a.Is4() {
		return "::ffff:" + a.String()
	}
	return a.String()
}
