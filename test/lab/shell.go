//go:build linux

package lab

import "context"

// Shell boots a guest whose console is this process's terminal, with a shell on it, and waits
// until the machine stops: when the shell ends, or with Ctrl-A X.
func Shell(ctx context.Context, cfg Config) error {
	cfg.shell = true
	g, err := Start(ctx, cfg)
	if err != nil {
		return err
	}
	defer g.Close()
	g.Wait()
	return nil
}
