package rdsdebug

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/openrds/openrds/internal/rdsping"
	"github.com/openrds/openrds/rds"
)

// Client talks to a Server of this host.
type Client struct {
	path string
	http http.Client
}

// NewClient is a client of the socket at path. It connects with each call.
func NewClient(path string) *Client {
	c := &Client{path: path}
	c.http.Transport = &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}}
	return c
}

// Path is the socket's.
func (c *Client) Path() string { return c.path }

func (c *Client) do(ctx context.Context, method, path string, q url.Values, body io.Reader) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://rds"+path+"?"+q.Encode(), body)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.path, err)
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 1024))
		return nil, fmt.Errorf("%s: %s", c.path, strings.TrimSpace(string(text)))
	}
	return resp, nil
}

// Info asks for a snapshot.
func (c *Client) Info(ctx context.Context, items rds.InfoItems) (*rds.Info, error) {
	resp, err := c.do(ctx, http.MethodGet, "/info", url.Values{"items": {itemLetters(items)}}, nil)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var in rds.Info
	if err := json.NewDecoder(resp.Body).Decode(&in); err != nil {
		return nil, fmt.Errorf("%s: %w", c.path, err)
	}
	return &in, nil
}

// broken is the error of an answer that could not be read to its end.
func (c *Client) broken(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		return fmt.Errorf("%s: the process has closed it or ended: %w", c.path, err)
	}
	return fmt.Errorf("%s: %w", c.path, err)
}

// Ping pings from one of the process's addresses.
func (c *Client) Ping(ctx context.Context, cfg rdsping.Config, report func(rdsping.Reply)) (rdsping.Summary, error) {
	body, err := json.Marshal(cfg)
	if err != nil {
		return rdsping.Summary{}, err
	}
	resp, err := c.do(ctx, http.MethodPost, "/ping", nil, bytes.NewReader(body))
	if err != nil {
		return rdsping.Summary{}, err
	}
	defer resp.Body.Close()
	var sum rdsping.Summary
	for dec := json.NewDecoder(resp.Body); ; {
		var l pingLine
		if err := dec.Decode(&l); err != nil {
			if ctx.Err() != nil {
				return sum, nil // the user ended it; the replies have been counted
			}
			return sum, c.broken(err)
		}
		switch {
		case l.Reply != nil:
			if l.Reply.Err == "" && !l.Reply.Dup {
				sum.Received++
			}
			sum.Sent = max(sum.Sent, l.Reply.Seq)
			report(*l.Reply)
		case l.Summary != nil:
			if l.Error != "" {
				return *l.Summary, errors.New(l.Error)
			}
			return *l.Summary, nil
		}
	}
}

// Trace copies packets to w as a pcap file until ctx is done, or packets were seen (0: no limit). full: with all of
// their payload. missed is how many are not there because w was slow.
func (c *Client) Trace(ctx context.Context, w io.Writer, packets int, full bool) (missed uint64, err error) {
	q := url.Values{}
	if packets > 0 {
		q.Set("packets", strconv.Itoa(packets))
	}
	if full {
		q.Set("full", "1")
	}
	resp, err := c.do(ctx, http.MethodGet, "/trace", q, nil)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	_, err = io.Copy(w, resp.Body)
	missed, _ = strconv.ParseUint(resp.Trailer.Get(missedTrailer), 10, 64)
	switch {
	case err == nil || ctx.Err() != nil:
		return missed, nil
	case errors.Is(err, io.ErrUnexpectedEOF):
		return missed, c.broken(err)
	}
	return missed, err
}
