package rdsdebug

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync/atomic"

	"github.com/openrds/openrds/internal/rdsping"
	"github.com/openrds/openrds/rds"
	"github.com/openrds/openrds/verbs"
)

// Handler shows svc: see the package comment for its paths. It stays usable after svc.Close, and shows an empty Service.
func Handler(svc *rds.Service) http.Handler {
	h := handler{svc}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", h.index)
	mux.HandleFunc("GET /info", h.info)
	mux.HandleFunc("POST /ping", h.ping)
	mux.HandleFunc("GET /trace", h.trace)
	return mux
}

type handler struct{ svc *rds.Service }

func (h handler) index(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	io.WriteString(w, `<!DOCTYPE html><title>RDS</title><h1>Reliable Datagram Sockets</h1>
<ul><li><a href="info?format=text">info</a> (<a href="info">JSON</a>; items=c,k,n,r,s,t,I,d for a part)
<li><a href="info?format=text&amp;items=n">connections</a>, <a href="info?format=text&amp;items=c">counters</a>
<li><a href="trace?packets=1000">the next 1000 packets</a> as pcap</ul>
`)
}

func (h handler) info(w http.ResponseWriter, r *http.Request) {
	items, err := ParseItems(r.FormValue("items"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	in := h.svc.Info(items)
	switch f := r.FormValue("format"); f {
	case "", "json":
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(&in)
	case "text":
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		fmt.Fprintf(w, "%s, process %d, %s\n", in.Program, in.PID, in.Time.Format("2006-01-02 15:04:05.000"))
		WriteText(w, &in, items, r.FormValue("verbose") != "")
	default:
		http.Error(w, fmt.Sprintf("format %q is neither json nor text", f), http.StatusBadRequest)
	}
}

// pingLine is one line of the answer to /ping: a reply, or the end.
type pingLine struct {
	Reply   *rdsping.Reply   `json:"reply,omitempty"`
	Summary *rdsping.Summary `json:"summary,omitempty"`
	Error   string           `json:"error,omitempty"`
}

func (h handler) ping(w http.ResponseWriter, r *http.Request) {
	var cfg rdsping.Config
	if err := json.NewDecoder(io.LimitReader(r.Body, 4096)).Decode(&cfg); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	enc := json.NewEncoder(w)
	flush := func() {}
	if f, ok := w.(http.Flusher); ok {
		flush = f.Flush
	}
	sum, err := rdsping.Run(r.Context(), h.svc, cfg, func(p rdsping.Reply) {
		enc.Encode(pingLine{Reply: &p})
		flush()
	})
	end := pingLine{Summary: &sum}
	if err != nil {
		end.Error = err.Error()
	}
	enc.Encode(end)
}

// traceQueue is how many packets may wait for a slow client; what comes beyond is left out, and counted.
const traceQueue = 4096

// traceSnap is how much of a packet is kept: headers of every layer, RDS header included, and some payload; all of it with
// ?full.
const traceSnap = 256

func (h handler) trace(w http.ResponseWriter, r *http.Request) {
	limit := uint64(1<<64 - 1)
	if s := r.FormValue("packets"); s != "" {
		n, err := strconv.ParseUint(s, 10, 63)
		if err != nil || n == 0 {
			http.Error(w, fmt.Sprintf("packets %q", s), http.StatusBadRequest)
			return
		}
		limit = n
	}
	snap := traceSnap
	if r.Form.Has("full") {
		snap = 1 << 16
	}
	var missed atomic.Uint64
	queue := make(chan []byte, traceQueue)
	stop, err := h.svc.TracePackets(func(p verbs.Packet) {
		rec := appendRecord(nil, &p, snap)
		select {
		case queue <- rec:
		default:
			missed.Add(1)
		}
	})
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotImplemented)
		return
	}
	defer stop()
	w.Header().Set("Content-Type", "application/vnd.tcpdump.pcap")
	w.Header().Set("Trailer", missedTrailer)
	defer func() { w.Header().Set(missedTrailer, strconv.FormatUint(missed.Load(), 10)) }()
	w.Write(fileHeader(snap))
	f, _ := w.(http.Flusher)
	if f != nil {
		f.Flush()
	}
	for n := uint64(0); n < limit; n++ {
		select {
		case rec := <-queue:
			if _, err := w.Write(rec); err != nil {
				return
			}
			if f != nil && len(queue) == 0 {
				f.Flush()
			}
		case <-r.Context().Done():
			return
		}
	}
}

// missedTrailer tells how many packets are not in the trace because the client was slow.
const missedTrailer = "Rds-Missed"

// linkTypeRaw: packets begin with their IPv4 or IPv6 header (LINKTYPE_RAW).
const linkTypeRaw = 101

// fileHeader is that of a pcap file with nanoseconds, little-endian.
func fileHeader(snap int) []byte {
	var b []byte
	le := binary.LittleEndian
	b = le.AppendUint32(b, 0xa1b23c4d)
	b = le.AppendUint16(b, 2)
	b = le.AppendUint16(b, 4)
	b = le.AppendUint64(b, 0)
	b = le.AppendUint32(b, uint32(snap+ipv6Len+udpLen))
	return le.AppendUint32(b, linkTypeRaw)
}

const (
	ipv4Len = 20
	ipv6Len = 40
	udpLen  = 8
)

// appendRecord appends p as a record of a pcap file, with the IP and UDP headers it had: the socket does not show them, but
// there is nothing else they could have been (rocev2 spec 1.2).
func appendRecord(b []byte, p *verbs.Packet, snap int) []byte {
	src, dst := p.Remote, p.Local
	if p.Out {
		src, dst = dst, src
	}
	ipLen := ipv6Len
	if dst.Addr().Is4() {
		ipLen = ipv4Len
	}
	full := ipLen + udpLen + len(p.Payload)
	kept := ipLen + udpLen + min(len(p.Payload), snap)
	le, be := binary.LittleEndian, binary.BigEndian
	b = le.AppendUint32(b, uint32(p.Time.Unix()))
	b = le.AppendUint32(b, uint32(p.Time.Nanosecond()))
	b = le.AppendUint32(b, uint32(kept))
	b = le.AppendUint32(b, uint32(full))
	if ipLen == ipv4Len {
		at := len(b)
		b = append(b, 0x45, p.TrafficClass)
		b = be.AppendUint16(b, uint16(full))
		b = be.AppendUint16(b, p.ID)
		b = be.AppendUint16(b, 0x4000) // DF
		b = append(b, p.HopLimit, 17, 0, 0)
		b = append(b, src.Addr().AsSlice()...)
		b = append(b, dst.Addr().AsSlice()...)
		be.PutUint16(b[at+10:], checksum(b[at:at+ipv4Len]))
	} else {
		b = be.AppendUint32(b, 6<<28|uint32(p.TrafficClass)<<20)
		b = be.AppendUint16(b, uint16(udpLen+len(p.Payload)))
		b = append(b, 17, p.HopLimit)
		s, d := src.Addr().As16(), dst.Addr().As16()
		b = append(append(b, s[:]...), d[:]...)
	}
	b = be.AppendUint16(b, src.Port())
	b = be.AppendUint16(b, dst.Port())
	b = be.AppendUint16(b, uint16(udpLen+len(p.Payload)))
	b = be.AppendUint16(b, 0)
	return append(b, p.Payload[:min(len(p.Payload), snap)]...)
}

// checksum is the internet checksum (RFC 1071).
func checksum(b []byte) uint16 {
	var s uint32
	for i := 0; i < len(b); i += 2 {
		s += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return ^uint16(s)
}
