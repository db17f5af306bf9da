use std::os::unix::net::UnixStream;

use super::*;

const WANTED: Wanted<'static> = Wanted {
    count: 2,
    backlog: 16,
    tcp: &TcpOptions { keepalive: None, user_timeout: std::time::Duration::ZERO },
    binding: Binding { beside_own: false, interface: None, freebind: false },
    mode: 0o640,
};

fn address_in(folder: &tempfile::TempDir) -> Address {
    Address::Unix(folder.path().join("s").into())
}

fn path_of(address: &Address) -> &Path {
    let Address::Unix(path) = address else { unreachable!() };
    path
}

#[test]
fn a_unix_socket_has_the_configured_mode_and_removes_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let address = address_in(&folder);
    let sockets = listen(&address, &WANTED).unwrap();
    assert_eq!(sockets.len(), 2);
    assert_eq!(sockets[1].address().unwrap(), address);
    let mode = || path_of(&address).metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(), 0o640);
    sockets[0].set_mode(0o600).unwrap();
    assert_eq!(mode(), 0o600);
    UnixStream::connect(path_of(&address)).unwrap();
    sockets[0].turn_away().unwrap();
    assert!(!path_of(&address).exists());
}

#[test]
fn listen_replaces_only_a_stale_socket_file() {
    let folder = tempfile::tempdir().unwrap();
    let address = address_in(&folder);
    let first = listen(&address, &WANTED).unwrap();
    let in_use = listen(&address, &WANTED).unwrap_err();
    assert_eq!(in_use.kind(), io::ErrorKind::AddrInUse);
    UnixStream::connect(path_of(&address)).unwrap();
    // Like a process that was killed: the file stays.
    drop(first);
    assert!(path_of(&address).exists());
    drop(listen(&address, &WANTED).unwrap());
    std::fs::remove_file(path_of(&address)).unwrap();
    std::fs::write(path_of(&address), "a file of the user").unwrap();
    listen(&address, &WANTED).unwrap_err();
    assert_eq!(std::fs::read_to_string(path_of(&address)).unwrap(), "a file of the user");
}

#[test]
fn the_file_of_a_successor_stays() {
    let folder = tempfile::tempdir().unwrap();
    let address = address_in(&folder);
    let old = listen(&address, &WANTED).unwrap();
    std::fs::remove_file(path_of(&address)).unwrap();
    let _new = listen(&address, &WANTED).unwrap();
    old[0].turn_away().unwrap();
    old[0].set_mode(0o666).unwrap();
    assert!(!old[0].is_reachable());
    UnixStream::connect(path_of(&address)).unwrap();
    assert_eq!(path_of(&address).metadata().unwrap().permissions().mode() & 0o777, 0o640);
}

#[test]
fn only_one_of_several_concurrent_binds_replaces_a_stale_file() {
    for _ in 0..20 {
        let folder = tempfile::tempdir().unwrap();
        let address = address_in(&folder);
        drop(listen(&address, &WANTED).unwrap());
        let results: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| listen(&address, &WANTED))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1, "{results:?}");
        UnixStream::connect(path_of(&address)).unwrap();
    }
}

#[test]
fn an_adopted_unix_socket_serves_those_who_wait_on_it() {
    let folder = tempfile::tempdir().unwrap();
    let address = address_in(&folder);
    let sockets = listen(&address, &WANTED).unwrap();
    let _waiting = UnixStream::connect(path_of(&address)).unwrap();
    let descriptor = sockets[0].as_fd().try_clone_to_owned().unwrap();
    drop(sockets);
    let inherited = ListeningSocket::inherit(descriptor, &address, None);
    let adopted = adopt(vec![inherited.try_clone().unwrap(), inherited], &WANTED).unwrap();
    assert_eq!(adopted.len(), 2);
    let ListeningSocket::Unix(socket) = &adopted[1] else { unreachable!() };
    socket.listener.accept().unwrap();
}
