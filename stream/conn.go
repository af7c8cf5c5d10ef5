package stream

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const dialTimeout = time.Second

// errFingerprint is a server that is not the one the join string names.
var errFingerprint = errors.New("the server's certificate is not the one in the join string")

// dialer makes connections to one log's server. It is a value without state
// but for its configuration.
type dialer struct {
	url  string // for nats.Connect
	show string // for people, without secrets
	opts []nats.Option
	// quick is for connections that carry little: an embedded server waits 50 ms
	// for a greeting of TLS before it takes a connection for plain, which is worth
	// the wait to a Writer, to a Reader that follows, and to checkpoints, whose
	// every octet would be enciphered and deciphered within one process.
	quick []nats.Option
}

func newDialer(cfg *Config) (*dialer, error) {
	n := 0
	for _, set := range []bool{cfg.Server != nil, cfg.Join != "", cfg.URL != ""} {
		if set {
			n++
		}
	}
	if n != 1 {
		return nil, fmt.Errorf("%w log settings: exactly one of an embedded server, a join string and a URL is needed, got %d", ErrInvalid, n)
	}
	switch {
	case cfg.Server != nil:
		return &dialer{show: cfg.Server.show(), opts: []nats.Option{
			nats.InProcessServer(cfg.Server.ns), nats.Token(cfg.Server.join.Secret)},
			quick: []nats.Option{nats.TLSHandshakeFirst(), nats.Secure(cfg.Server.join.tls())}}, nil
	case cfg.Join != "":
		j, err := ParseJoin(cfg.Join)
		if err != nil {
			return nil, err
		}
		return &dialer{url: "tls://" + j.Addr, show: "tls://" + j.Addr, opts: []nats.Option{
			nats.Token(j.Secret), nats.TLSHandshakeFirst(), nats.Secure(j.tls())}}, nil
	}
	return urlDialer(cfg)
}

func urlDialer(cfg *Config) (*dialer, error) {
	d := &dialer{url: cfg.URL}
	var show []string
	for _, u := range strings.Split(cfg.URL, ",") {
		u = strings.TrimSpace(u)
		if !strings.HasPrefix(u, "nats://") && !strings.HasPrefix(u, "tls://") {
			return nil, fmt.Errorf("%w log URL: must begin with nats:// or tls://", ErrInvalid)
		}
		scheme, rest, _ := strings.Cut(u, "://")
		if i := strings.LastIndexByte(rest, '@'); i >= 0 {
			rest = rest[i+1:]
		}
		show = append(show, scheme+"://"+rest)
	}
	d.show = strings.Join(show, ",")
	auth := 0
	if cfg.User != "" {
		auth++
		d.opts = append(d.opts, nats.UserInfo(cfg.User, cfg.Password))
	}
	if cfg.Token != "" {
		auth++
		d.opts = append(d.opts, nats.Token(cfg.Token))
	}
	if cfg.CredsFile != "" {
		auth++
		d.opts = append(d.opts, nats.UserCredentials(cfg.CredsFile))
	}
	if auth > 1 {
		return nil, fmt.Errorf("%w log settings: more than one of user, token and credentials file", ErrInvalid)
	}
	if cfg.TLS != nil {
		d.opts = append(d.opts, nats.Secure(cfg.TLS.Clone()))
	}
	return d, nil
}

// tls trusts the one certificate the join string names, and no other.
func (j Join) tls() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		// The fingerprint takes the place of names and roots.
		InsecureSkipVerify: true,
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
			if len(raw) == 0 || sha256.Sum256(raw[0]) != j.Fingerprint {
				return errFingerprint
			}
			return nil
		},
	}
}

// ctxDialer remembers why dialling failed: nats.go says only that there are no
// servers.
type ctxDialer struct {
	ctx  context.Context
	mu   sync.Mutex
	last error
}

func (d *ctxDialer) Dial(network, addr string) (net.Conn, error) {
	nd := net.Dialer{Timeout: dialTimeout, KeepAlive: 15 * time.Second}
	c, err := nd.DialContext(d.ctx, network, addr)
	d.mu.Lock()
	d.last = err
	d.mu.Unlock()
	return c, err
}

// conn is a connection that is never repaired: when it is lost it stays lost,
// and its owner makes another. So nothing is ever sent twice or late by a
// library's buffer.
type conn struct {
	nc   *nats.Conn
	lost chan struct{} // closed when the connection is

	acks  chan *nats.Msg
	inbox string // prefix of reply subjects of acks
}

func (d *dialer) connect(ctx context.Context, name string, more []nats.Option) (*conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("connect to %s: %w", d.show, err)
	}
	c := &conn{lost: make(chan struct{})}
	cd := &ctxDialer{ctx: ctx}
	var once atomic.Bool
	opts := append([]nats.Option{
		nats.Name("ftckpt " + name),
		nats.NoReconnect(), nats.ReconnectBufSize(-1),
		nats.Timeout(dialTimeout), nats.FlusherTimeout(dialTimeout),
		nats.PingInterval(time.Second), nats.MaxPingsOutstanding(2),
		nats.SkipSubjectValidation(),
		nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}), // else it prints
		nats.ClosedHandler(func(*nats.Conn) {
			if once.CompareAndSwap(false, true) {
				close(c.lost)
			}
		}),
	}, d.opts...)
	if d.url != "" {
		opts = append(opts, nats.SetCustomDialer(cd))
	}
	nc, err := nats.Connect(d.url, append(opts, more...)...)
	if err != nil {
		cd.mu.Lock()
		if cd.last != nil && errors.Is(err, nats.ErrNoServers) {
			err = cd.last
		}
		cd.mu.Unlock()
		return nil, fmt.Errorf("connect to %s: %w", d.show, classify(err))
	}
	c.nc = nc
	return c, nil
}

func (c *conn) close() {
	if c != nil {
		c.nc.Close()
	}
}

// classify puts err under this package's sentinels.
func classify(err error) error {
	var api *jetstream.APIError
	var cert *tls.CertificateVerificationError
	switch {
	case err == nil, errors.Is(err, ErrUnreachable), errors.Is(err, ErrRefused), errors.Is(err, ErrFull):
		return err
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%w: %w", ErrUnreachable, err)
	case errors.Is(err, nats.ErrAuthorization), errors.Is(err, nats.ErrAuthExpired), errors.Is(err, nats.ErrAuthRevoked):
		return fmt.Errorf("%w: %w; check the join string or the credentials", ErrRefused, err)
	case errors.Is(err, errFingerprint):
		return fmt.Errorf("%w: %w; take the join string the server prints now", ErrRefused, errFingerprint)
	case errors.Is(err, nats.ErrSecureConnRequired), errors.Is(err, nats.ErrSecureConnWanted), errors.As(err, &cert):
		return fmt.Errorf("%w: %w", ErrRefused, err)
	case errors.Is(err, jetstream.ErrJetStreamNotEnabled), errors.Is(err, jetstream.ErrJetStreamNotEnabledForAccount):
		return fmt.Errorf("%w: %w; enable JetStream on the server and for this account", ErrRefused, err)
	case errors.As(err, &api):
		return apiError(api)
	}
	return fmt.Errorf("%w: %w", ErrUnreachable, err)
}

// JetStream's error codes that mean something to us.
const (
	apiNoMessage        = 10037
	apiWrongLastSeq     = 10071
	apiStoreFailed      = 10077 // with one of several descriptions
	apiNoResources      = 10023
	apiNoMemory         = 10028
	apiNoStorage        = 10047
	apiMaxBytesRequired = 10113
	apiClusterNotReady  = 10008
	apiNoPeers          = 10005
)

func apiError(e *jetstream.APIError) error {
	switch e.ErrorCode {
	case apiStoreFailed:
		if strings.Contains(e.Description, "maximum bytes") {
			return fmt.Errorf("%w: %w", ErrFull, e)
		}
	case apiNoResources, apiNoMemory, apiNoStorage:
		return fmt.Errorf("%w: %w; free space on the log's host or ask for smaller streams", ErrFull, e)
	case apiClusterNotReady, apiNoPeers:
		return fmt.Errorf("%w: %w", ErrUnreachable, e)
	}
	if e.Code == 503 {
		return fmt.Errorf("%w: %w", ErrUnreachable, e)
	}
	return fmt.Errorf("%w: %w", ErrRefused, e)
}

// apiTimeout bounds one question to the server.
const apiTimeout = time.Second

// request asks JetStream's API; what it answers is decoded into reply.
func (c *conn) request(ctx context.Context, subject string, ask, reply any) error {
	return c.requestIn(ctx, apiTimeout, subject, ask, reply)
}

func (c *conn) requestIn(ctx context.Context, timeout time.Duration, subject string, ask, reply any) error {
	body, err := json.Marshal(ask)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	msg, err := c.nc.RequestWithContext(ctx, subject, body)
	if err != nil {
		return classify(err)
	}
	var e struct {
		Error *jetstream.APIError `json:"error"`
	}
	if err := json.Unmarshal(msg.Data, &e); err != nil {
		return fmt.Errorf("%w answer of the server: %w", ErrCorrupt, err)
	}
	if e.Error != nil {
		if e.Error.ErrorCode == apiNoMessage {
			return ErrMissing
		}
		return classify(e.Error)
	}
	if err := json.Unmarshal(msg.Data, reply); err != nil {
		return fmt.Errorf("%w answer of the server: %w", ErrCorrupt, err)
	}
	return nil
}

// rawMsg is a stored message.
type rawMsg struct {
	Subject string    `json:"subject"`
	Seq     StreamSeq `json:"seq"`
	Data    []byte    `json:"data"`
}

// getMsg asks for one message; by is one of last_by_subj, next_by_subj (with
// seq), or seq alone. ErrMissing when there is none. It is answered by the
// stream's leader: AllowDirect is off.
func (c *conn) getMsg(ctx context.Context, stream string, by map[string]any) (rawMsg, error) {
	var r struct {
		Message rawMsg `json:"message"`
	}
	err := c.request(ctx, "$JS.API.STREAM.MSG.GET."+stream, by, &r)
	return r.Message, err
}

// pubAck is what the server answers to a publish.
type pubAck struct {
	Seq   StreamSeq           `json:"seq"`
	Error *jetstream.APIError `json:"error"`
}

// parseAck reads the answer to a publish.
func parseAck(m *nats.Msg) (StreamSeq, error) {
	if len(m.Data) == 0 && m.Header.Get("Status") != "" {
		return 0, fmt.Errorf("%w: nobody listens on the log's subject (status %s)", ErrUnreachable, m.Header.Get("Status"))
	}
	var a pubAck
	if err := json.Unmarshal(m.Data, &a); err != nil {
		return 0, fmt.Errorf("%w acknowledgement: %w", ErrCorrupt, err)
	}
	if a.Error != nil {
		return 0, classify(a.Error)
	}
	if a.Seq == 0 {
		return 0, fmt.Errorf("%w acknowledgement: no sequence", ErrCorrupt)
	}
	return a.Seq, nil
}
