package ib

import (
	"testing"

	"github.com/openrds/openrds/internal/leak"
)

func TestMain(m *testing.M) { leak.Main(m) }
