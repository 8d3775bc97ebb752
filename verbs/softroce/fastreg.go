package softroce

import "github.com/openrds/openrds/verbs"

// AllocFastRegMR implements verbs.PD.
func (p *pd) AllocFastRegMR(maxPages int) (verbs.MR, error) { return nil, verbs.ErrNotSupported }

// AllocPageList implements verbs.PD.
func (p *pd) AllocPageList(maxPages int) (verbs.PageList, error) { return nil, verbs.ErrNotSupported }
