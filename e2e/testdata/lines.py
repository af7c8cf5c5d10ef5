"""lines.py ADDR PORT: an asyncio line server that knows nothing of ftckpt.

See servers_test.go for what it answers."""
import asyncio
import sys


async def serve(reader, writer):
    n = total = 0
    while line := (await reader.readline()).rstrip(b"\n"):
        n += 1
        for b in line:
            total = (total * 31 + b) & 0xFFFFFFFF
        writer.write(b"%d %d %s\n" % (n, total, line[::-1]))
        await writer.drain()
    writer.close()


async def main():
    server = await asyncio.start_server(serve, sys.argv[1], int(sys.argv[2]))
    await server.serve_forever()


asyncio.run(main())
