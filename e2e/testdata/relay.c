// relay VIP PORT BACKEND BACKEND-PORT FROM: a TCP proxy with one thread. For every
// client it opens a connection of its own to the back end, from FROM, and carries
// bytes both ways, half-closes too. It reads no faster than it can write. When it
// loses a connection to the back end it closes the client's.
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

struct side {
	int fd;
	int connecting, eof, shut;
	unsigned events;
	struct side *other;
	size_t n, at; // what was read here and waits to be written there
	char buf[64 << 10];
};

static int ep;

static void die(const char *what) { perror(what); exit(1); }

static struct sockaddr_in addr(const char *ip, const char *port) {
	struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
	if (inet_pton(AF_INET, ip, &a.sin_addr) != 1) die(ip);
	return a;
}

static void want(struct side *s) {
	unsigned e = 0;
	if (s->connecting || s->other->n > 0) e |= EPOLLOUT;
	if (!s->connecting && !s->eof && s->n == 0) e |= EPOLLIN;
	if (e == s->events) return;
	struct epoll_event ev = {.events = e, .data.ptr = s};
	s->events = e;
	if (epoll_ctl(ep, EPOLL_CTL_MOD, s->fd, &ev)) die("epoll_ctl");
}

static struct side *side(int fd) {
	struct side *s = calloc(1, sizeof *s);
	struct epoll_event ev = {.data.ptr = s};
	int one = 1;
	s->fd = fd;
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	fcntl(fd, F_SETFL, O_NONBLOCK);
	if (epoll_ctl(ep, EPOLL_CTL_ADD, fd, &ev)) die("epoll_ctl");
	return s;
}

// flush writes what waits in from; -1 when the connection is broken.
static int flush(struct side *from) {
	struct side *to = from->other;
	while (from->n > 0 && !to->connecting) {
		ssize_t w = send(to->fd, from->buf + from->at, from->n, MSG_NOSIGNAL);
		if (w < 0) return errno == EAGAIN ? 0 : -1;
		from->at += w;
		from->n -= w;
	}
	if (from->n == 0 && from->eof && !to->shut && !to->connecting) {
		to->shut = 1;
		shutdown(to->fd, SHUT_WR);
	}
	return 0;
}

// handle answers -1 when both sides are to be closed.
static int handle(struct side *s, unsigned events) {
	if (s->connecting && events & (EPOLLOUT | EPOLLERR | EPOLLHUP)) {
		int err = 0;
		socklen_t len = sizeof err;
		getsockopt(s->fd, SOL_SOCKET, SO_ERROR, &err, &len);
		if (err) return -1;
		s->connecting = 0;
	}
	if ((events & EPOLLERR) || ((events & EPOLLHUP) && s->eof)) return -1; // nothing goes either way
	if (!s->connecting && s->n == 0 && !s->eof && events & (EPOLLIN | EPOLLERR | EPOLLHUP)) {
		ssize_t r = recv(s->fd, s->buf, sizeof s->buf, 0);
		if (r < 0 && errno != EAGAIN) return -1;
		if (r == 0) s->eof = 1;
		if (r > 0) s->n = r, s->at = 0;
	}
	if (flush(s) || flush(s->other)) return -1;
	return s->eof && s->other->eof && s->n == 0 && s->other->n == 0 ? -1 : 0;
}

int main(int argc, char **argv) {
	if (argc != 6) return 2;
	struct sockaddr_in here = addr(argv[1], argv[2]), back = addr(argv[3], argv[4]), from = addr(argv[5], "0");
	int one = 1, l = socket(AF_INET, SOCK_STREAM, 0);
	signal(SIGPIPE, SIG_IGN);
	setsockopt(l, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (bind(l, (void *)&here, sizeof here) || listen(l, 128)) die("listen");
	ep = epoll_create1(0);
	struct epoll_event ev = {.events = EPOLLIN};
	epoll_ctl(ep, EPOLL_CTL_ADD, l, &ev);
	for (;;) {
		struct epoll_event evs[64];
		int n = epoll_wait(ep, evs, 64, -1);
		for (int i = 0; i < n; i++) {
			struct side *s = evs[i].data.ptr;
			if (s) {
				if (handle(s, evs[i].events)) {
					struct side *o = s->other;
					for (int j = i + 1; j < n; j++) // what it has yet to say is void
						if (evs[j].data.ptr == o || evs[j].data.ptr == s) evs[j--] = evs[--n];
					close(s->fd);
					close(o->fd);
					free(s);
					free(o);
				} else {
					want(s);
					want(s->other);
				}
				continue;
			}
			int c = accept(l, NULL, NULL);
			if (c < 0) continue;
			int b = socket(AF_INET, SOCK_STREAM, 0);
			setsockopt(b, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
			if (bind(b, (void *)&from, sizeof from) || (fcntl(b, F_SETFL, O_NONBLOCK), connect(b, (void *)&back, sizeof back) && errno != EINPROGRESS)) {
				close(b); // FROM may be no address of this host any more
				close(c);
				continue;
			}
			struct side *x = side(c), *y = side(b);
			x->other = y;
			y->other = x;
			y->connecting = 1;
			want(x);
			want(y);
		}
	}
}
