package rds

import "github.com/openrds/openrds/verbs"

// TracePackets shows the packets of all providers that can (softroce can) to fn until stop has returned: see
// verbs.PacketTracer for what fn may do. ErrNotSupported if none can.
func (svc *Service) TracePackets(fn func(verbs.Packet)) (stop func(), err error) {
	var stops []func()
	for _, p := range svc.tr.Providers() {
		if t, ok := p.(verbs.PacketTracer); ok {
			stops = append(stops, t.TracePackets(fn))
		}
	}
	if len(stops) == 0 {
		return nil, ErrNotSupported
	}
	return func() {
		for _, s := range stops {
			s()
		}
	}, nil
}
