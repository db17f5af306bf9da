//! The further fields of a version 2 header (TLVs).

use ringway::proxy_header::{ALPN, AUTHORITY, CRC32C, UNIQUE_ID, fields, write_with};

use super::*;

/// The fields of a header: its type, and its value.
async fn fields_of(stream: &mut TcpStream) -> Vec<(u8, Vec<u8>)> {
    let mut bytes = Vec::new();
    loop {
        if let Parsed::Header(header) = parse(&bytes) {
            let list = fields(&bytes[header.fields..header.length]);
            return list.map(|(kind, value)| (kind, value.to_vec())).collect();
        }
        assert!(soon("bytes", stream.read_buf(&mut bytes)).await.unwrap() > 0, "ended after {bytes:?}");
    }
}

#[tokio::test]
async fn version_2_carries_further_fields() {
    let (backend, address) = recorder().await;
    let log = tempfile::NamedTempFile::new().unwrap();
    let pool = format!(
        "{NO_CHECK}\nsend_proxy: {{ version: v2, tlvs: [authority, alpn, unique_id, crc32c], pass: [0xEA, 0xE0] }}"
    );
    let yaml = accepting(&[address], "{ from: [127.0.0.1], required: false, timeout: 3s }", &pool);
    let ringway = Ringway::start(&format!("access_log: {{ path: {:?}, format: json }}\n{yaml}", log.path())).await;
    let hello = loadtest::client_hello("A.Example", &["h2", "http/1.1"]);
    let source: Ends =
        Ends { source: "198.51.100.7:1".parse().unwrap(), destination: "203.0.113.1:443".parse().unwrap() };
    let received = [(0xe0, &[1, 2][..]), (0x30, b"netns"), (0xea, b"\xff\0"), (0xea, b"twice")];
    for header in [Vec::new(), write_with(Some(source), &received, true)] {
        let is_proxied = !header.is_empty();
        let mut stream = TcpStream::connect(ringway.web()).await.unwrap();
        stream.write_all(&[header, hello.clone()].concat()).await.unwrap();
        let (mut server, _) = soon("accept", backend.accept()).await.unwrap();
        let list = fields_of(&mut server).await;
        let value = |wanted: u8| list.iter().find(|(kind, _)| *kind == wanted).map(|(_, value)| value.clone());
        assert_eq!((value(AUTHORITY).unwrap(), value(ALPN).unwrap()), (b"a.example".to_vec(), b"h2".to_vec()));
        let passed: Vec<_> = list.iter().filter(|(kind, _)| *kind >= 0x30).cloned().collect();
        let wanted = [(0xe0, vec![1, 2]), (0xea, b"\xff\0".to_vec()), (0xea, b"twice".to_vec())];
        assert_eq!(passed, if is_proxied { &wanted[..] } else { &[] });
        assert_eq!(list.last().unwrap().0, CRC32C);
        let id = String::from_utf8(value(UNIQUE_ID).unwrap()).unwrap();
        drop((stream, server));
        eventually("the same id in the log", || {
            std::fs::read_to_string(log.path()).unwrap().contains(&format!("\"id\":\"{id}\""))
        })
        .await;
    }
    // The balancer is closer to the client, so its value wins.
    let pool = format!("{NO_CHECK}\nsend_proxy: {{ version: v2, tlvs: [authority], pass: [2] }}");
    ringway.reload(&accepting(&[address], "{ from: [127.0.0.1] }", &pool)).await.unwrap();
    let mut stream = TcpStream::connect(ringway.web()).await.unwrap();
    let header = write_with(Some(source), &[(AUTHORITY, b"outer.example")], false);
    stream.write_all(&[header, hello].concat()).await.unwrap();
    let (mut server, _) = soon("accept", backend.accept()).await.unwrap();
    assert_eq!(fields_of(&mut server).await, [(AUTHORITY, b"outer.example".to_vec())]);
}
