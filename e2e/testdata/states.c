// states.c: a single-threaded server that knows nothing of ftckpt and brings its
// connections into awkward states: states ADDR PORT. See states_test.go for what
// a client may say and hears.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MAX_CONNS = 128, MAX_LINE = 4096, ROOM = 3 << 20 };

struct conn {
	uint32_t n, sum;
	size_t len;
	char line[MAX_LINE];

	int late;         // reads nothing before the word
	size_t want, got; // octets that are no lines
	uint32_t got_sum;

	size_t flood, said; // octets to say
	int close_after;

	int urgent; // takes urgent octets
	char oob[256];
	int noob;
};

static struct pollfd fds[MAX_CONNS];
static struct conn *conns[MAX_CONNS];
static int n = 1, deaf;

static int put(int fd, const char *p, size_t len)
{
	while (len > 0) {
		ssize_t w = write(fd, p, len);
		if (w < 0 && errno == EAGAIN) {
			struct pollfd f = {.fd = fd, .events = POLLOUT};
			poll(&f, 1, -1);
			continue;
		}
		if (w <= 0)
			return -1;
		p += w;
		len -= w;
	}
	return 0;
}

static int say(int fd, const char *s) { return put(fd, s, strlen(s)); }

static void number(int fd, int level, int opt, int v) { setsockopt(fd, level, opt, &v, sizeof v); }

static int get(int fd, int level, int opt)
{
	int v = -1;
	socklen_t l = sizeof v;
	getsockopt(fd, level, opt, &v, &l);
	return v;
}

// The octet at a place of every flood.
static char octet(size_t at) { return (char)((at * 2654435761u) >> 13 ^ at >> 20); }

static int flood(int fd, struct conn *c)
{
	static char buf[65536];
	while (c->said < c->flood) {
		size_t len = c->flood - c->said;
		if (len > sizeof buf)
			len = sizeof buf;
		for (size_t i = 0; i < len; i++)
			buf[i] = octet(c->said + i);
		ssize_t w = write(fd, buf, len);
		if (w < 0 && errno == EAGAIN)
			return 0;
		if (w <= 0)
			return -1;
		c->said += w;
	}
	if (c->flood && c->close_after)
		shutdown(fd, SHUT_WR);
	c->flood = c->said = 0;
	return 0;
}

static int answer(int fd, struct conn *c)
{
	char out[MAX_LINE + 512];
	unsigned long v;

	c->line[c->len] = 0;
	c->len = 0;
	if (!strcmp(c->line, "go")) {
		deaf = 0;
		return say(fd, "gone\n");
	}
	if (!strcmp(c->line, "read")) {
		for (int i = 1; i < n; i++)
			conns[i]->late = 0;
		return say(fd, "reading\n");
	}
	if (!strcmp(c->line, "deaf")) {
		deaf = 1;
		return say(fd, "deaf\n");
	}
	if (sscanf(c->line, "late %lu", &v) == 1) {
		c->late = 1;
		c->want = v;
		return say(fd, "late\n");
	}
	if (sscanf(c->line, "flood %lu", &v) == 1 || sscanf(c->line, "floodclose %lu", &v) == 1) {
		c->flood = v;
		c->close_after = c->line[5] == 'c';
		return flood(fd, c);
	}
	if (!strcmp(c->line, "urgent") || !strcmp(c->line, "inline")) {
		c->urgent = c->line[0] == 'u';
		number(fd, SOL_SOCKET, SO_OOBINLINE, !c->urgent);
		return say(fd, "yes\n");
	}
	if (!strcmp(c->line, "shout")) { // an urgent octet among others
		if (say(fd, "ab") || send(fd, "!", 1, MSG_OOB) != 1)
			return -1;
		return say(fd, "cd\n");
	}
	if (!strcmp(c->line, "cork")) {
		number(fd, IPPROTO_TCP, TCP_CORK, 1);
		return say(fd, "first ");
	}
	if (!strcmp(c->line, "uncork")) {
		if (say(fd, "second\n"))
			return -1;
		number(fd, IPPROTO_TCP, TCP_CORK, 0);
		return 0;
	}
	if (!strcmp(c->line, "set")) {
		number(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, 23456);
		setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "reno", 4);
		number(fd, IPPROTO_TCP, TCP_NODELAY, 1);
		number(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, 7777);
		number(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
		number(fd, IPPROTO_TCP, TCP_KEEPIDLE, 1);
		number(fd, IPPROTO_TCP, TCP_KEEPINTVL, 1);
		number(fd, IPPROTO_TCP, TCP_KEEPCNT, 4);
		return say(fd, "set\n");
	}
	if (!strcmp(c->line, "show")) {
		char cc[16] = {0};
		socklen_t l = sizeof cc;
		getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, cc, &l);
		snprintf(out, sizeof out, "timeout %d, %s, nodelay %d, lowat %d, keepalive %d after %d every %d, %d times\n",
			 get(fd, IPPROTO_TCP, TCP_USER_TIMEOUT), cc, get(fd, IPPROTO_TCP, TCP_NODELAY),
			 get(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT), get(fd, SOL_SOCKET, SO_KEEPALIVE),
			 get(fd, IPPROTO_TCP, TCP_KEEPIDLE), get(fd, IPPROTO_TCP, TCP_KEEPINTVL), get(fd, IPPROTO_TCP, TCP_KEEPCNT));
		return say(fd, out);
	}
	snprintf(out, sizeof out, "%u %u %.*s %s\n", ++c->n, c->sum, c->noob, c->oob, c->line);
	return say(fd, out);
}

static int serve(int fd, struct conn *c, int revents)
{
	static char buf[65536];
	if (c->urgent && revents & POLLPRI && c->noob < (int)sizeof c->oob - 1 && recv(fd, c->oob + c->noob, 1, MSG_OOB) == 1)
		c->noob++;
	if (revents & POLLOUT && flood(fd, c))
		return -1;
	if (c->late || !(revents & (POLLIN | POLLHUP | POLLERR)))
		return 0;
	ssize_t got = read(fd, buf, sizeof buf);
	if (got < 0 && errno == EAGAIN)
		return 0;
	if (got <= 0)
		return -1;
	for (ssize_t i = 0; i < got; i++) {
		if (c->got < c->want) {
			c->got_sum = c->got_sum * 31 + (unsigned char)buf[i];
			if (++c->got == c->want) {
				char out[64];
				snprintf(out, sizeof out, "got %zu %u\n", c->got, c->got_sum);
				c->got = c->want = 0;
				if (say(fd, out))
					return -1;
			}
			continue;
		}
		c->sum = c->sum * 31 + (unsigned char)buf[i];
		if (buf[i] == '\n') {
			if (answer(fd, c))
				return -1;
			continue;
		}
		if (c->len == MAX_LINE - 1)
			return -1;
		c->line[c->len++] = buf[i];
	}
	return 0;
}

int main(int argc, char **argv)
{
	struct sockaddr_in a = {.sin_family = AF_INET};
	int s = socket(AF_INET, SOCK_STREAM, 0), room = ROOM;

	signal(SIGPIPE, SIG_IGN);
	number(s, SOL_SOCKET, SO_REUSEADDR, 1);
	if (argc != 3)
		return 2;
	setsockopt(s, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room);
	setsockopt(s, SOL_SOCKET, SO_SNDBUFFORCE, &room, sizeof room);
	a.sin_port = htons(atoi(argv[2]));
	inet_pton(AF_INET, argv[1], &a.sin_addr);
	if (bind(s, (void *)&a, sizeof a) || listen(s, 64)) {
		perror("listen");
		return 1;
	}
	fds[0] = (struct pollfd){.fd = s, .events = POLLIN};
	for (;;) {
		fds[0].events = deaf ? 0 : POLLIN;
		for (int i = 1; i < n; i++) {
			struct conn *c = conns[i];
			fds[i].events = (c->late ? 0 : POLLIN) | (c->urgent ? POLLPRI : 0) | (c->flood ? POLLOUT : 0);
			fds[i].fd = fds[i].events ? abs(fds[i].fd) : -abs(fds[i].fd); // a late one is not looked at
		}
		if (poll(fds, n, -1) < 0)
			continue;
		for (int i = n - 1; i > 0; i--) {
			if (!fds[i].revents || !serve(fds[i].fd, conns[i], fds[i].revents))
				continue;
			close(fds[i].fd);
			free(conns[i]);
			n--;
			fds[i] = fds[n];
			conns[i] = conns[n];
		}
		if (fds[0].revents && !deaf && n < MAX_CONNS) {
			fds[n] = (struct pollfd){.fd = accept4(s, 0, 0, SOCK_NONBLOCK), .events = POLLIN};
			if (fds[n].fd < 0)
				continue;
			conns[n++] = calloc(1, sizeof(struct conn));
		}
	}
}
