//go:build !invariants

package ref

// holders remembers nothing without the tag, and costs nothing.
type holders struct{}

func (*holders) reset()          {}
func (*holders) took(string)     {}
func (*holders) gave(string)     {}
func (*holders) history() string { return "" }

// Holders describes who holds references: empty without -tags invariants.
func (*holders) Holders() []string { return nil }
