package softroce

import "github.com/openrds/openrds/verbs"

// RegOnDemandMR implements verbs.PD.
func (p *pd) RegOnDemandMR(mem verbs.PagedMemory, iova uint64, access verbs.Access) (verbs.MR, error) {
	return nil, verbs.ErrNotSupported
}

// AdviseMR implements verbs.PD.
func (p *pd) AdviseMR(a verbs.Advice, sgs []verbs.SGE) error { return verbs.ErrNotSupported }
