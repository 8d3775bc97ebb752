package main

import (
	"errors"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// newMan writes the manual; "rdsctl completion" is cobra's own.
func newMan() *cobra.Command {
	return &cobra.Command{
		Use:   "man DIRECTORY",
		Short: "Write the manual pages",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageError{errors.New("man needs a directory")}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			root := cmd.Root()
			root.DisableAutoGenTag = true                                    // the same text for the same program,
			root.PersistentFlags().Lookup("dir").DefValue = "[/run/openrds]" // whoever writes it
			return doc.GenManTree(root, &doc.GenManHeader{Title: "RDSCTL", Section: "1", Source: "OpenRDS", Manual: "OpenRDS"}, args[0])
		},
	}
}
