// Package rdsdebug lets people look into a running rds.Service: over HTTP beside net/http/pprof, and through a
// unix socket that cmd/rdsctl finds by itself.
//
//	mux.Handle("/debug/rds/", http.StripPrefix("/debug/rds", rdsdebug.Handler(svc)))
//
//	srv, err := rdsdebug.Listen(svc) // $OPENRDS_RUNTIME_DIR, /run/openrds, $XDG_RUNTIME_DIR/openrds
//	defer srv.Close()
//
// # Paths
//
//	GET  /          what there is
//	GET  /info      rds.Info: as JSON, or in rds-info's columns with ?format=text; ?items=cknrstId chooses parts
//	POST /ping      a ping through this process, which owns its addresses: rdsping.Config in, a JSON object per reply out
//	GET  /trace     the packets of softroce as pcap (raw IP), until the client goes away or after ?packets=N
//
// # Security
//
// The unix socket is in a directory that only its owner may enter. The handler itself checks nobody: whoever mounts it on a
// public server gives away addresses and counters, and lets strangers ping.
package rdsdebug
