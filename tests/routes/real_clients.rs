//! The handshakes of real TLS clients.
