package softroce

import "github.com/openrds/openrds/verbs"

// AllocMW implements verbs.PD.
func (p *pd) AllocMW(t verbs.MWType) (verbs.MW, error) { return nil, verbs.ErrNotSupported }
