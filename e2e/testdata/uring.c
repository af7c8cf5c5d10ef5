// uring.c: a server that holds what CRIU cannot dump: uring ADDR PORT
#include <arpa/inet.h>
#include <linux/io_uring.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	struct io_uring_params p = {0};
	struct sockaddr_in a = {.sin_family = AF_INET};
	int one = 1, s = socket(AF_INET, SOCK_STREAM, 0);

	if (argc != 3 || syscall(SYS_io_uring_setup, 8, &p) < 0) {
		perror("io_uring_setup");
		return 1;
	}
	setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	a.sin_port = htons(atoi(argv[2]));
	inet_pton(AF_INET, argv[1], &a.sin_addr);
	if (bind(s, (void *)&a, sizeof a) || listen(s, 16)) {
		perror("listen");
		return 1;
	}
	for (;;) {
		int c = accept(s, 0, 0);
		if (c >= 0)
			close(c);
	}
}
