package rds

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// exported is what godoc shows of a package: names ("Socket.Cancel", "MsgPeek") with their comments.
func exported(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := make(map[string]string)
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				name := d.Name.Name
				if d.Recv != nil {
					r := d.Recv.List[0].Type
					if p, ok := r.(*ast.StarExpr); ok {
						r = p.X
					}
					name = r.(*ast.Ident).Name + "." + name
				}
				out[name] = d.Doc.Text()
			case *ast.GenDecl:
				for _, s := range d.Specs {
					switch s := s.(type) {
					case *ast.ValueSpec:
						for _, n := range s.Names {
							out[n.Name] = d.Doc.Text() + s.Doc.Text() + s.Comment.Text()
						}
					case *ast.TypeSpec:
						out[s.Name.Name] = d.Doc.Text() + s.Doc.Text()
						if st, ok := s.Type.(*ast.StructType); ok {
							for _, f := range st.Fields.List {
								for _, n := range f.Names {
									out[s.Name.Name+"."+n.Name] = f.Doc.Text() + f.Comment.Text()
								}
							}
						}
					}
				}
			}
		}
	}
	for name := range out {
		for _, part := range strings.Split(name, ".") {
			if !ast.IsExported(part) {
				delete(out, name)
			}
		}
	}
	return out
}

// kernelNamesIn are the kernel's names in a cell of a table: "RDS_CMSG_ATOMIC_CSWP, _FADD" has two.
func kernelNamesIn(cell string) (names []string) {
	prefix := ""
	for _, n := range regexp.MustCompile(`\b(?:RDS|SO|MSG|SCM|SIOCRDS)_?[A-Z0-9_]+\b|\s_[A-Z_]+\b|\bnet\.rds\.[a-z_.]+`).FindAllString(cell, -1) {
		n = strings.TrimSpace(n)
		if strings.HasPrefix(n, "_") {
			n = prefix + n
		} else if i := strings.LastIndexByte(n, '_'); i >= 0 {
			prefix = n[:i]
		}
		names = append(names, n)
	}
	return names
}

// Whoever looks for a name of the kernel's finds in godoc what it is here, and what docs/compatibility.md says that it is here does
// exist.
func TestKernelNames(t *testing.T) {
	doc, err := os.ReadFile("../docs/compatibility.md")
	if err != nil {
		t.Fatal(err)
	}
	here, connNames := exported(t, "."), exported(t, "../conn")
	all := make([]string, 0, len(here))
	for _, text := range here {
		all = append(all, text)
	}
	for name, text := range connNames {
		if strings.HasPrefix(name, "Config.") {
			all = append(all, text)
		}
	}
	godoc := strings.Join(all, "\n")
	exists := func(name string) bool {
		if _, ok := here[name]; ok {
			return true
		}
		if rest, ok := strings.CutPrefix(name, "Config.Conn."); ok {
			_, ok = connNames["Config."+rest]
			return ok
		}
		if _, ok := connNames["Config."+name]; ok { // after the first of a list
			return true
		}
		for n := range here {
			if strings.HasSuffix(n, "."+name) {
				return true
			}
		}
		return false
	}
	text := string(doc)
	text = text[strings.Index(text, "## RDMA: the kernel's names"):strings.Index(text, "## Socket semantics: the differences")]
	rows, names, idents := 0, 0, 0
	var seen []string
	for line := range strings.Lines(text) {
		cells := strings.Split(line, "|")
		if len(cells) < 4 || strings.HasPrefix(strings.TrimSpace(cells[1]), "--") {
			continue
		}
		kernel, ours := cells[1], cells[2]
		rows++
		for _, m := range regexp.MustCompile("`([A-Z*][A-Za-z0-9.]*)(?:\\(.*?\\))?`").FindAllStringSubmatch(ours, -1) {
			idents++
			if name := strings.TrimPrefix(m[1], "*"); !exists(name) {
				t.Errorf("%s: there is no %s", strings.TrimSpace(kernel), name)
			}
		}
		found := kernelNamesIn(kernel)
		seen = append(seen, found...)
		if !strings.Contains(ours, "`") || strings.Contains(ours, "`ErrNotSupported`") && !strings.Contains(ours, ",") {
			continue // there is none, which the row says, or has said elsewhere
		}
		for _, n := range found {
			names++
			if strings.HasPrefix(n, "RDS6_") || strings.HasSuffix(n, "_") {
				continue // RDS_INFO_*
			}
			if !regexp.MustCompile(`\b` + regexp.QuoteMeta(n) + `\b`).MatchString(godoc) {
				t.Errorf("no doc comment has %s, which is %s", n, strings.TrimSpace(ours))
			}
		}
	}
	if rows < 80 || names < 50 || idents < 100 {
		t.Errorf("found %d rows, %d names of the kernel's, %d of ours", rows, names, idents)
	}

	// Every name that the specification has in its tables of options, control messages and information is in the document.
	spec, err := os.ReadFile("../docs/spec/rds-protocol.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range []struct{ from, to string }{{"### 1.7 ", "### 1.9 "}, {"### 6.2 ", "### 6.3 "}, {"### 6.3 ", "## 7. "}} {
		text := string(spec)
		text = text[strings.Index(text, part.from):strings.Index(text, part.to)]
		for line := range strings.Lines(text) {
			cells := strings.Split(line, "|")
			if len(cells) < 4 || strings.HasPrefix(strings.TrimSpace(cells[1]), "--") {
				continue
			}
			var want []string
			switch part.from {
			case "### 1.7 ":
				want = kernelNamesIn(cells[1])
				if part := strings.TrimSpace(cells[2]); regexp.MustCompile(`^[A-Z_ /]{6,}$`).MatchString(part) { // control messages, without their prefix
					want = append(want, strings.Split(part, " / ")...)
				}
			case "### 6.2 ":
				if strings.Contains(cells[1], "{") { // those of the pools: memoryPoolNames
					continue
				}
				for _, n := range regexp.MustCompile(`\b[a-z]+(?:_[a-z0-9]+)+\b`).FindAllString(cells[1], -1) {
					if kernelRank(n) == len(kernelNames) { // Service.Stats has the others
						want = append(want, n)
					}
				}
			default:
				want = regexp.MustCompile(`\b[a-z]+(?:_[a-z0-9]+)+\b`).FindAllString(cells[1], -1)
			}
			for _, n := range want {
				n = strings.TrimPrefix(n, "RDS_INFO_")
				if !strings.Contains(string(doc), n) && !slices.ContainsFunc(seen, func(s string) bool { return strings.HasSuffix(s, n) }) {
					t.Errorf("%s of the specification is not in docs/compatibility.md", n)
				}
			}
		}
	}
}
