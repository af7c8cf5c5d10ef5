// mangle.c: a single-threaded server that knows nothing of ftckpt: mangle ADDR
// PORT. It answers every byte with one that depends on all bytes of the
// connection before it, at once and in its own time: a lost, doubled or foreign
// byte shows in all that follow. See churn_test.go for the transformation.
#include <arpa/inet.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MAX_CONNS = 1024, CHUNK = 1500 };

static struct pollfd fds[MAX_CONNS];
static uint32_t states[MAX_CONNS];

static int serve(int fd, uint32_t *state)
{
	unsigned char buf[CHUNK];
	ssize_t got = read(fd, buf, sizeof buf);

	if (got <= 0)
		return -1;
	for (ssize_t i = 0; i < got; i++) {
		unsigned char in = buf[i];

		buf[i] = in ^ *state >> 24;
		*state = (*state ^ in) * 16777619u;
	}
	for (ssize_t at = 0; at < got;) {
		ssize_t n = write(fd, buf + at, got - at);

		if (n <= 0)
			return -1;
		at += n;
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
	if (bind(s, (void *)&a, sizeof a) || listen(s, 128)) {
		perror("listen");
		return 1;
	}
	fds[0] = (struct pollfd){.fd = s, .events = POLLIN};
	for (;;) {
		if (poll(fds, n, -1) < 0)
			continue;
		for (int i = n - 1; i > 0; i--) {
			if (!fds[i].revents || !serve(fds[i].fd, &states[i]))
				continue;
			close(fds[i].fd);
			n--;
			fds[i] = fds[n];
			states[i] = states[n];
		}
		if (fds[0].revents && n < MAX_CONNS) {
			fds[n] = (struct pollfd){.fd = accept(s, 0, 0), .events = POLLIN};
			if (fds[n].fd < 0)
				continue;
			states[n++] = 2166136261u;
		}
	}
}
