// lines.c: a single-threaded line server that knows nothing of ftckpt:
// lines ADDR PORT. See servers_test.go for what it answers.
#include <arpa/inet.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MAX_CONNS = 64, MAX_LINE = 4096 };

struct conn {
	uint32_t n, sum;
	size_t len;
	char line[MAX_LINE];
};

static struct pollfd fds[MAX_CONNS];
static struct conn *conns[MAX_CONNS];

static int put(int fd, const char *p, size_t n)
{
	while (n > 0) {
		ssize_t w = write(fd, p, n);
		if (w <= 0)
			return -1;
		p += w;
		n -= w;
	}
	return 0;
}

static int answer(int fd, struct conn *c)
{
	char out[MAX_LINE + 64];
	int n = snprintf(out, sizeof out, "%u %u ", ++c->n, c->sum);
	for (size_t i = c->len; i > 0; i--)
		out[n++] = c->line[i - 1];
	out[n++] = '\n';
	c->len = 0;
	return put(fd, out, n);
}

static int serve(int fd, struct conn *c)
{
	char buf[1000];
	ssize_t got = read(fd, buf, sizeof buf);
	if (got <= 0)
		return -1;
	for (ssize_t i = 0; i < got; i++) {
		if (buf[i] == '\n') {
			if (answer(fd, c))
				return -1;
			continue;
		}
		if (c->len == MAX_LINE)
			return -1;
		c->line[c->len++] = buf[i];
		c->sum = c->sum * 31 + (unsigned char)buf[i];
	}
	return 0;
}

int main(int argc, char **argv)
{
	struct sockaddr_in a = {.sin_family = AF_INET};
	int one = 1, s = socket(AF_INET, SOCK_STREAM, 0), n = 1;

	signal(SIGPIPE, SIG_IGN);
	setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (argc != 3)
		return 2;
	a.sin_port = htons(atoi(argv[2]));
	inet_pton(AF_INET, argv[1], &a.sin_addr);
	if (bind(s, (void *)&a, sizeof a) || listen(s, 64)) {
		perror("listen");
		return 1;
	}
	fds[0] = (struct pollfd){.fd = s, .events = POLLIN};
	for (;;) {
		if (poll(fds, n, -1) < 0)
			continue;
		for (int i = n - 1; i > 0; i--) {
			if (!fds[i].revents || !serve(fds[i].fd, conns[i]))
				continue;
			close(fds[i].fd);
			free(conns[i]);
			n--;
			fds[i] = fds[n];
			conns[i] = conns[n];
		}
		if (fds[0].revents && n < MAX_CONNS) {
			fds[n] = (struct pollfd){.fd = accept(s, 0, 0), .events = POLLIN};
			if (fds[n].fd < 0)
				continue;
			conns[n++] = calloc(1, sizeof(struct conn));
		}
	}
}
