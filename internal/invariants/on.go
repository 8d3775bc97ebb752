//go:build invariants

package invariants

// Enabled reports whether this binary was built with -tags invariants.
const Enabled = true
