/*
 * verbspeer: a verbs process that is told what to do, line by line, on its standard input, and answers each
 * line with one: "ok ..." or "err ...". One process is one end of one connection.
 *
 *   listen ADDR PORT        getreq                  accept HEX       reject HEX
 *   resolve SRC DST PORT    connect HEX             event            disconnect
 *   recv ID OFF LEN         bind ID OFF LEN         poll             attr
 *   send ID OFF LEN         sendimm ID OFF LEN IMM  sendinv ID OFF LEN RKEY
 *   write ID OFF LEN RADDR RKEY      writeimm ID OFF LEN RADDR RKEY IMM
 *   read ID OFF LEN RADDR RKEY       cas ID OFF RADDR RKEY CMP SWAP     fadd ID OFF RADDR RKEY ADD
 *   fill OFF LEN SEED       check OFF LEN SEED      clear OFF LEN    peek OFF    poke OFF VALUE
 *
 * OFF is an offset in the one region, MEM bytes large, that getreq and resolve register. Numbers are as strtoull
 * takes them. Connection parameters: 16 READs and atomics both ways, retry count 6, RNR retry count 7.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <infiniband/verbs.h>
#include <rdma/rdma_cma.h>

#define MEM (8 << 20)
#define DEPTH 256
#define LIMIT_MS 30000

static struct rdma_event_channel *ec;
static struct rdma_cm_id *lid, *id;
static struct ibv_pd *pd;
static struct ibv_cq *cq;
static struct ibv_mr *mr;
static struct ibv_mw *mw;
static char *mem;
static char args[8][4096];
static int nargs;

static void say(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vprintf(fmt, ap);
	va_end(ap);
	putchar('\n');
	fflush(stdout);
}

static void fail(const char *what) { say("err %s: %s", what, strerror(errno)); }

static unsigned long long num(int i) { return i < nargs ? strtoull(args[i], NULL, 0) : 0; }

static void hex(char *out, const void *p, int n)
{
	const unsigned char *b = p;

	*out = 0;
	for (int i = 0; i < n; i++)
		sprintf(out + 2 * i, "%02x", b[i]);
}

/* unhex decodes argument i ("-" is none) into out and returns the number of bytes. */
static int unhex(int i, unsigned char *out)
{
	int n = 0;

	if (i >= nargs || args[i][0] == '-')
		return 0;
	for (const char *s = args[i]; s[0] && s[1]; s += 2)
		sscanf(s, "%2hhx", &out[n++]);
	return n;
}

/* next waits for a CM event; NULL when none came. The caller acknowledges it. */
static struct rdma_cm_event *next(void)
{
	struct pollfd p = { .fd = ec->fd, .events = POLLIN };
	struct rdma_cm_event *ev;

	if (poll(&p, 1, LIMIT_MS) != 1 || rdma_get_cm_event(ec, &ev))
		return NULL;
	return ev;
}

/* expect waits for the event want and answers anything else with an error line. */
static struct rdma_cm_event *expect(enum rdma_cm_event_type want)
{
	struct rdma_cm_event *ev = next();
	char priv[1024];

	if (!ev) {
		say("err no event, wanted %s", rdma_event_str(want));
		return NULL;
	}
	if (ev->event == want)
		return ev;
	hex(priv, ev->param.conn.private_data, ev->param.conn.private_data_len);
	say("err %s status %d private %s", rdma_event_str(ev->event), ev->status, priv);
	rdma_ack_cm_event(ev);
	return NULL;
}

static int setup(void)
{
	struct ibv_qp_init_attr a = {
		.qp_type = IBV_QPT_RC,
		.cap = { .max_send_wr = DEPTH, .max_recv_wr = DEPTH, .max_send_sge = 1, .max_recv_sge = 1 },
	};
	int access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC | IBV_ACCESS_MW_BIND;

	if (!(pd = ibv_alloc_pd(id->verbs)) || !(cq = ibv_create_cq(id->verbs, 2 * DEPTH, NULL, NULL, 0)))
		return -1;
	a.send_cq = a.recv_cq = cq;
	if (rdma_create_qp(id, pd, &a))
		return -1;
	if (posix_memalign((void **)&mem, 4096, MEM))
		return -1;
	memset(mem, 0, MEM);
	return (mr = ibv_reg_mr(pd, mem, MEM, access)) ? 0 : -1;
}

static void setup_answer(const char *private)
{
	if (setup())
		fail("setup");
	else
		say("ok %llu %u %u %s", (unsigned long long)(uintptr_t)mem, mr->rkey, id->qp->qp_num, private);
}

static struct addrinfo *resolve(const char *host, const char *port, int passive)
{
	struct addrinfo hints = { .ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICHOST | (passive ? AI_PASSIVE : 0) }, *ai;

	return getaddrinfo(host, port, &hints, &ai) ? NULL : ai;
}

static void do_listen(void)
{
	struct addrinfo *ai = resolve(args[1], args[2], 1);

	if (!ai || rdma_create_id(ec, &lid, NULL, RDMA_PS_TCP) || rdma_bind_addr(lid, ai->ai_addr) || rdma_listen(lid, 4))
		fail("listen");
	else
		say("ok");
}

static void do_getreq(void)
{
	struct rdma_cm_event *ev = expect(RDMA_CM_EVENT_CONNECT_REQUEST);
	char priv[1024];

	if (!ev)
		return;
	id = ev->id;
	hex(priv, ev->param.conn.private_data, ev->param.conn.private_data_len);
	rdma_ack_cm_event(ev);
	setup_answer(priv);
}

static void do_resolve(void)
{
	struct addrinfo *src = resolve(args[1], NULL, 1), *dst = resolve(args[2], args[3], 0);
	struct rdma_cm_event *ev;

	if (!src || !dst || rdma_create_id(ec, &id, NULL, RDMA_PS_TCP) || rdma_resolve_addr(id, src->ai_addr, dst->ai_addr, 5000))
		return fail("resolve");
	if (!(ev = expect(RDMA_CM_EVENT_ADDR_RESOLVED)))
		return;
	rdma_ack_cm_event(ev);
	if (rdma_resolve_route(id, 5000))
		return fail("resolve route");
	if (!(ev = expect(RDMA_CM_EVENT_ROUTE_RESOLVED)))
		return;
	rdma_ack_cm_event(ev);
	setup_answer("");
}

static struct rdma_conn_param *param(int i)
{
	static struct rdma_conn_param p;
	static unsigned char priv[512];

	memset(&p, 0, sizeof(p));
	p.private_data = priv;
	p.private_data_len = unhex(i, priv);
	p.responder_resources = p.initiator_depth = 16;
	p.retry_count = 6;
	p.rnr_retry_count = 7;
	return &p;
}

/* established waits for the end of the handshake. */
static void established(int rc)
{
	struct rdma_cm_event *ev;
	char priv[1024];

	if (rc)
		return fail("handshake");
	if (!(ev = expect(RDMA_CM_EVENT_ESTABLISHED)))
		return;
	hex(priv, ev->param.conn.private_data, ev->param.conn.private_data_len);
	rdma_ack_cm_event(ev);
	say("ok %s", priv);
}

static void do_event(void)
{
	struct rdma_cm_event *ev = next();

	if (!ev)
		return say("err no event");
	say("ok %s", rdma_event_str(ev->event));
	rdma_ack_cm_event(ev);
}

static void do_attr(void)
{
	struct ibv_qp_attr a;
	struct ibv_qp_init_attr ia;
	int mask = IBV_QP_STATE | IBV_QP_PATH_MTU | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER;

	if (ibv_query_qp(id->qp, &a, mask, &ia))
		return fail("query");
	say("ok state=%d mtu=%d timeout=%d retry=%d rnr_retry=%d rd=%d dest_rd=%d min_rnr=%d", a.qp_state, 128 << a.path_mtu, a.timeout,
	    a.retry_cnt, a.rnr_retry, a.max_rd_atomic, a.max_dest_rd_atomic, a.min_rnr_timer);
}

static void do_recv(void)
{
	struct ibv_sge sge = { (uintptr_t)mem + num(2), num(3), mr->lkey };
	struct ibv_recv_wr wr = { .wr_id = num(1), .sg_list = &sge, .num_sge = 1 }, *bad;

	if ((errno = ibv_post_recv(id->qp, &wr, &bad)))
		fail("post");
	else
		say("ok");
}

static void do_send(const char *cmd)
{
	struct ibv_sge sge = { (uintptr_t)mem + num(2), num(3), mr->lkey };
	struct ibv_send_wr wr = { .wr_id = num(1), .sg_list = &sge, .num_sge = 1, .send_flags = IBV_SEND_SIGNALED }, *bad;

	if (!strcmp(cmd, "send")) {
		wr.opcode = IBV_WR_SEND;
	} else if (!strcmp(cmd, "sendimm")) {
		wr.opcode = IBV_WR_SEND_WITH_IMM;
		wr.imm_data = htonl(num(4));
	} else if (!strcmp(cmd, "sendinv")) {
		wr.opcode = IBV_WR_SEND_WITH_INV;
		wr.invalidate_rkey = num(4);
	} else if (!strcmp(cmd, "bind")) {
		if (!mw && !(mw = ibv_alloc_mw(pd, IBV_MW_TYPE_2)))
			return fail("alloc_mw");
		wr.opcode = IBV_WR_BIND_MW;
		wr.num_sge = 0;
		wr.bind_mw.mw = mw;
		wr.bind_mw.rkey = ibv_inc_rkey(mw->rkey);
		wr.bind_mw.bind_info = (struct ibv_mw_bind_info){ mr, (uintptr_t)mem + num(2), num(3), IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ };
	} else if (!strcmp(cmd, "cas") || !strcmp(cmd, "fadd")) {
		int cas = cmd[0] == 'c';

		sge.length = 8;
		wr.opcode = cas ? IBV_WR_ATOMIC_CMP_AND_SWP : IBV_WR_ATOMIC_FETCH_AND_ADD;
		wr.wr.atomic.remote_addr = num(3);
		wr.wr.atomic.rkey = num(4);
		wr.wr.atomic.compare_add = num(5);
		wr.wr.atomic.swap = num(6);
	} else {
		wr.opcode = !strcmp(cmd, "read") ? IBV_WR_RDMA_READ : !strcmp(cmd, "write") ? IBV_WR_RDMA_WRITE : IBV_WR_RDMA_WRITE_WITH_IMM;
		wr.wr.rdma.remote_addr = num(4);
		wr.wr.rdma.rkey = num(5);
		wr.imm_data = htonl(num(6));
	}
	if ((errno = ibv_post_send(id->qp, &wr, &bad)))
		return fail("post");
	if (wr.opcode == IBV_WR_BIND_MW)
		mw->rkey = wr.bind_mw.rkey; /* not before: the provider reads the old one from it */
	say("ok %u", mw ? mw->rkey : 0);
}

static void do_poll(void)
{
	struct ibv_wc wc;
	struct timespec t0, t, nap = { .tv_nsec = 200000 };
	int n;

	clock_gettime(CLOCK_MONOTONIC, &t0);
	while ((n = ibv_poll_cq(cq, 1, &wc)) == 0) {
		nanosleep(&nap, NULL);
		clock_gettime(CLOCK_MONOTONIC, &t);
		if ((t.tv_sec - t0.tv_sec) * 1000 > LIMIT_MS)
			return say("err no completion");
	}
	if (n < 0)
		return fail("poll");
	/* The last is the key a SEND invalidated; it shares its place with the immediate, and the flag that tells is
	 * not to be relied on: rxe hands the kernel's flags on, which are not libibverbs'. */
	say("ok %llu %d %d %u %u %d %u", (unsigned long long)wc.wr_id, wc.status, wc.opcode, wc.byte_len,
	    wc.wc_flags & IBV_WC_WITH_IMM ? ntohl(wc.imm_data) : 0, wc.wc_flags, wc.invalidated_rkey);
}

/* pattern is the byte at position i of the sequence of seed; the tests have the same. */
static unsigned char pattern(unsigned seed, unsigned i) { return ((i * 2654435761u + seed * 40503u) >> 13) ^ i; }

static void do_fill(void)
{
	unsigned char *p = (unsigned char *)mem + num(1);
	unsigned len = num(2), seed = num(3);

	for (unsigned i = 0; i < len; i++)
		p[i] = pattern(seed, i);
	say("ok");
}

static void do_check(void)
{
	unsigned char *p = (unsigned char *)mem + num(1);
	unsigned len = num(2), seed = num(3);

	for (unsigned i = 0; i < len; i++)
		if (p[i] != pattern(seed, i))
			return say("err byte %u is %02x, want %02x", i, p[i], pattern(seed, i));
	say("ok");
}

static int run(char *line)
{
	const char *cmd;

	nargs = 0;
	for (char *tok = strtok(line, " \n"); tok && nargs < 8; tok = strtok(NULL, " \n"))
		snprintf(args[nargs++], sizeof(args[0]), "%s", tok);
	if (!nargs)
		return 0;
	cmd = args[0];
	if (!strcmp(cmd, "quit"))
		return 1;
	if (!strcmp(cmd, "listen"))
		do_listen();
	else if (!strcmp(cmd, "getreq"))
		do_getreq();
	else if (!strcmp(cmd, "resolve"))
		do_resolve();
	else if (!strcmp(cmd, "accept"))
		established(rdma_accept(id, param(1)));
	else if (!strcmp(cmd, "connect"))
		established(rdma_connect(id, param(1)));
	else if (!strcmp(cmd, "reject"))
		rdma_reject(id, param(1)->private_data, param(1)->private_data_len) ? fail("reject") : say("ok");
	else if (!strcmp(cmd, "disconnect"))
		rdma_disconnect(id) ? fail("disconnect") : say("ok");
	else if (!strcmp(cmd, "event"))
		do_event();
	else if (!strcmp(cmd, "attr"))
		do_attr();
	else if (!strcmp(cmd, "recv"))
		do_recv();
	else if (!strcmp(cmd, "poll"))
		do_poll();
	else if (!strcmp(cmd, "fill"))
		do_fill();
	else if (!strcmp(cmd, "check"))
		do_check();
	else if (!strcmp(cmd, "clear")) {
		memset(mem + num(1), 0, num(2));
		say("ok");
	} else if (!strcmp(cmd, "peek"))
		say("ok %llu", *(unsigned long long *)(mem + num(1)));
	else if (!strcmp(cmd, "poke")) {
		*(unsigned long long *)(mem + num(1)) = num(2);
		say("ok");
	} else
		do_send(cmd);
	return 0;
}

int main(void)
{
	static char line[8192];

	if (!(ec = rdma_create_event_channel()))
		return perror("rdma_create_event_channel"), 1;
	while (fgets(line, sizeof(line), stdin) && !run(line))
		;
	return 0;
}
