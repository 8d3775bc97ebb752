package rdsdebug

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/openrds/openrds/rds"
)

// RuntimeDirVar is the environment variable that overrides where sockets are.
const RuntimeDirVar = "OPENRDS_RUNTIME_DIR"

// RuntimeDir is where the sockets of this user's processes are: $OPENRDS_RUNTIME_DIR, /run/openrds for root,
// $XDG_RUNTIME_DIR/openrds, or a directory of the user in the system's place for temporary files.
func RuntimeDir() string {
	if d := os.Getenv(RuntimeDirVar); d != "" {
		return d
	}
	if os.Geteuid() == 0 {
		return "/run/openrds"
	}
	if d := os.Getenv("XDG_RUNTIME_DIR"); d != "" {
		return filepath.Join(d, "openrds")
	}
	return filepath.Join(os.TempDir(), fmt.Sprintf("openrds-%d", os.Geteuid()))
}

// RuntimeDirs is where to look for processes: RuntimeDir and, if this is root, those of the other users, which are theirs and real
// directories.
func RuntimeDirs() []string {
	dirs := []string{RuntimeDir()}
	if os.Geteuid() == 0 && os.Getenv(RuntimeDirVar) == "" {
		dirs = append(dirs, usersDirs("/run/user", os.TempDir())...)
	}
	return dirs
}

// usersDirs are the runtime directories below run (UID/openrds) and tmp (openrds-UID).
func usersDirs(run, tmp string) (dirs []string) {
	a, _ := filepath.Glob(filepath.Join(run, "*", "openrds")) // the only error is a bad pattern
	b, _ := filepath.Glob(filepath.Join(tmp, "openrds-*"))
	for _, d := range append(a, b...) {
		uid := filepath.Base(filepath.Dir(d))
		if u, ok := strings.CutPrefix(filepath.Base(d), "openrds-"); ok {
			uid = u
		}
		st, err := os.Lstat(d)
		if err == nil && st.IsDir() && st.Mode().Perm()&0o022 == 0 && ownedBy(st, uid) {
			dirs = append(dirs, d)
		}
	}
	return dirs
}

const socketSuffix = ".sock"

// Server serves one Service on a unix socket.
type Server struct {
	path   string
	srv    *http.Server
	cancel context.CancelFunc
	wg     sync.WaitGroup
	once   sync.Once
	err    error
}

// Listen serves svc on a socket in RuntimeDir, named by the process, where rdsctl looks. The directory is made if it is not
// there; one that others may write to is refused.
func Listen(svc *rds.Service) (*Server, error) { return ListenIn(svc, RuntimeDir()) }

// ListenIn is Listen in a directory of the caller's choice.
func ListenIn(svc *rds.Service, dir string) (*Server, error) {
	if err := checkDir(dir); err != nil {
		return nil, err
	}
	// Several Services of a process have a socket each. What a dead process of the same number left is in the way of
	// nobody: Discover removes it, and so does this.
	for n := 0; ; n++ {
		path := filepath.Join(dir, fmt.Sprintf("%d-%d%s", os.Getpid(), n, socketSuffix))
		l, err := net.Listen("unix", path)
		if errors.Is(err, syscall.EADDRINUSE) {
			if c, err := net.Dial("unix", path); err == nil {
				c.Close()
				continue
			}
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, fmt.Errorf("debug socket: %w", err)
			}
			n--
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("debug socket: %w", err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		s := &Server{path: path, cancel: cancel, srv: &http.Server{Handler: Handler(svc), ReadHeaderTimeout: 10 * time.Second,
			BaseContext: func(net.Listener) context.Context { return ctx }}}
		s.wg.Go(func() { s.srv.Serve(l) })
		return s, nil
	}
}

// checkDir makes dir, and refuses one that is somebody else's or open to others.
func checkDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("runtime directory: %w", err)
	}
	st, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("runtime directory: %w", err)
	}
	if !st.IsDir() || st.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("runtime directory %s is %v: wants a directory that only its owner writes to", dir, st.Mode())
	}
	return nil
}

// Path is the socket's.
func (s *Server) Path() string { return s.path }

// Close ends requests in progress and removes the socket. nil the second time. The Service is not touched.
func (s *Server) Close() error {
	s.once.Do(func() {
		s.cancel()
		s.err = s.srv.Close()
		s.wg.Wait()
	})
	return s.err
}

func gone(pid int) bool {
	p, err := os.FindProcess(pid)
	return err == nil && errors.Is(p.Signal(syscall.Signal(0)), os.ErrProcessDone)
}

// Discover lists the sockets in dir whose processes answer, by process number. Those of processes that are gone are removed.
func Discover(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var found []string
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), socketSuffix)
		if !ok {
			continue
		}
		pid, err := strconv.Atoi(strings.SplitN(name, "-", 2)[0])
		if err != nil {
			continue
		}
		path := filepath.Join(dir, e.Name())
		c, err := net.Dial("unix", path)
		if err != nil {
			if errors.Is(err, syscall.ECONNREFUSED) && gone(pid) {
				os.Remove(path)
			}
			continue
		}
		c.Close()
		found = append(found, path)
	}
	return found, nil
}
