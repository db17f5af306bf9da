"""Captures the first TLS message (ClientHello) of real clients, as test data for Ringway's parser.

    python3 tests/hellos/capture.py NAME COMMAND...

PORT in the command stands for the port on which this script listens. The script keeps the bytes of NAME.bin as they arrived, and then
closes the connection, so the command fails. Example:

    python3 tests/hellos/capture.py openssl openssl s_client -connect 127.0.0.1:PORT -servername www.example.com
"""

import pathlib
import socket
import subprocess
import sys


def is_whole(data):
    """Whether the records at the beginning of the data hold one whole handshake message."""
    message = b""
    while len(data) >= 5:
        length = int.from_bytes(data[3:5], "big")
        message += data[5:5 + length]
        data = data[5 + length:]
    return len(message) >= 4 and len(message) >= 4 + int.from_bytes(message[1:4], "big")


def main():
    name, command = sys.argv[1], sys.argv[2:]
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(20)
    port = str(listener.getsockname()[1])
    client = subprocess.Popen(
        [part.replace("PORT", port) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        connection, _ = listener.accept()
        connection.settimeout(20)
        data = b""
        while not is_whole(data):
            part = connection.recv(1 << 16)
            if not part:
                sys.exit(f"{name}: the client ended after {len(data)} bytes")
            data += part
        connection.close()
    finally:
        client.terminate()
        client.wait()
    file = pathlib.Path(__file__).with_name(name + ".bin")
    file.write_bytes(data)
    print(f"{file.name}: {len(data)} bytes")


main()
