//! Who may talk to whom, over real sockets.

use std::fs;
use std::io;
use std::time::Duration;

use base64::Engine;
use rcgen::SanType;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::timeout;

use super::*;
use crate::types::with_causes;

/// Nothing here takes this long unless it hangs.
const PATIENCE: Duration = Duration::from_secs(20);

fn key(secret: u8) -> ClusterKey {
    ClusterKey::from_secret(&[secret; 32]).expect("long enough")
}

fn node(secret: u8) -> PeerTls {
    PeerTls::from_keys(&key(secret).into()).expect("a certificate")
}

/// A node whose key file lists these.
fn node_of(secrets: &[u8]) -> PeerTls {
    PeerTls::from_keys(&ring(secrets)).expect("a certificate")
}

fn ring(secrets: &[u8]) -> KeyRing {
    let line = |secret: &u8| base64::engine::general_purpose::STANDARD.encode([*secret; 32]);
    let lines: Vec<String> = secrets.iter().map(line).collect();
    KeyRing::parse(format!("{}\n{}", crate::cluster::key::LIST_HEAD, lines.join("\n")).as_bytes()).expect("a list")
}

/// Whether each side got a byte of the other: (server, client).
async fn talk(server: &PeerTls, client: &PeerTls) -> (io::Result<u8>, io::Result<u8>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("an address");
    let serve = async {
        let (stream, _) = listener.accept().await?;
        let mut stream = server.accept(stream).await?;
        stream.write_u8(1).await?;
        stream.flush().await?;
        stream.read_u8().await
    };
    let call = async {
        let mut stream = client.connect(TcpStream::connect(address).await?).await?;
        stream.write_u8(2).await?;
        stream.flush().await?;
        stream.read_u8().await
    };
    timeout(PATIENCE, async { tokio::join!(serve, call) }).await.expect("no side hangs")
}

async fn assert_refused(server: &PeerTls, client: &PeerTls) {
    let (served, called) = talk(server, client).await;
    assert!(served.is_err() && called.is_err(), "{served:?} {called:?}");
}

async fn assert_talk(server: &PeerTls, client: &PeerTls) {
    let (served, called) = talk(server, client).await;
    assert_eq!((served.expect("the client's byte"), called.expect("the server's byte")), (2, 1));
}

#[tokio::test]
async fn nodes_of_one_key_talk() {
    assert_talk(&node(1), &node(1)).await;
}

#[tokio::test]
async fn nodes_of_another_key_are_refused_by_either_side() {
    assert_refused(&node(1), &node(2)).await;
    // Each side by itself: the other one believes the stranger and is not believed.
    let gullible = |own: u8, believes: u8| {
        let (own, believed) = (derived_authority(&key(own)).unwrap(), derived_authority(&key(believes)).unwrap());
        let (certificate, private_key) = mint(&own).expect("a certificate");
        Identity {
            chain: vec![certificate],
            private_key,
            authorities: vec![believed.der().clone()],
            name: ServerName::try_from(DERIVED_NAME).expect("a name"),
            keys: ["test"; 2],
        }
        .into_sides()
        .map(PeerTls::of)
        .expect("usable")
    };
    assert_refused(&node(1), &gullible(2, 1)).await;
    assert_refused(&gullible(2, 1), &node(1)).await;
    assert_talk(&gullible(1, 1), &node(1)).await;
}

#[tokio::test]
async fn neighbouring_steps_of_a_change_of_keys_talk_and_others_do_not() {
    let steps: [&[u8]; 4] = [&[1], &[1, 2], &[2, 1], &[2]];
    for (at, step) in steps.iter().enumerate() {
        for (other_at, other) in steps.iter().enumerate() {
            match at.abs_diff(other_at) <= 1 {
                true => assert_talk(&node_of(step), &node_of(other)).await,
                false => assert_refused(&node_of(step), &node_of(other)).await,
            }
        }
    }
}

#[tokio::test]
async fn replaced_keys_count_from_the_next_connection_on() {
    let config = Config::default();
    let changing = node(1);
    let revocations = changing.revocations();
    changing.replace(&config, &ring(&[1, 2])).expect("usable");
    changing.replace(&config, &ring(&[2, 1])).expect("usable");
    assert_talk(&changing, &node(2)).await;
    assert_eq!(*revocations.borrow(), 0, "nobody lost trust");
    changing.replace(&config, &ring(&[2])).expect("usable");
    assert_refused(&changing, &node(1)).await;
    assert_refused(&node_of(&[1, 3]), &changing).await;
    assert_eq!(*revocations.borrow(), 1);
}

#[tokio::test]
async fn distrust_is_told_from_other_errors_on_both_sides() {
    let (served, called) = talk(&node(1), &node(2)).await;
    for error in [served.expect_err("refused"), called.expect_err("refused")] {
        assert!(is_distrust(&error), "{error:?}");
    }
    assert!(!is_distrust(&io::Error::from(io::ErrorKind::ConnectionReset)));
    let behind = crate::types::Failure::new(crate::types::FailureKind::Internal, "x")
        .with_source(io::Error::new(io::ErrorKind::InvalidData, rustls::Error::NoCertificatesPresented));
    assert!(is_distrust(&behind));
}

#[tokio::test]
async fn plain_tcp_and_callers_without_a_certificate_are_refused() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("an address");
    let server = node(1);
    let plain = async {
        let mut stream = TcpStream::connect(address).await.expect("a connection");
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.expect("sent");
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        answer
    };
    let serve = async {
        let (stream, _) = listener.accept().await.expect("a connection");
        server.accept(stream).await.map(|_| ())
    };
    let (served, answer) = timeout(PATIENCE, async { tokio::join!(serve, plain) }).await.expect("no side hangs");
    assert!(served.is_err());
    assert!(!answer.starts_with(b"\0\0"), "an HTTP/2 frame: {answer:?}");

    let mut roots = RootCertStore::empty();
    roots.add(derived_authority(&key(1)).expect("an authority").der().clone()).expect("an authority");
    let mut anonymous = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&TLS13])
        .expect("TLS 1.3")
        .with_root_certificates(roots)
        .with_no_client_auth();
    anonymous.alpn_protocols = vec![ALPN.to_vec()];
    let sides = Sides::from_keys(&key(1).into()).expect("a certificate");
    let anonymous = PeerTls::of(Sides { connector: TlsConnector::from(Arc::new(anonymous)), ..sides });
    assert_refused(&node(1), &anonymous).await;
}

#[tokio::test]
async fn another_protocol_inside_is_refused() {
    let mut roots = RootCertStore::empty();
    let authority = derived_authority(&key(1)).expect("an authority");
    roots.add(authority.der().clone()).expect("an authority");
    let (certificate, private_key) = mint(&authority).expect("a certificate");
    let provider = Arc::new(ring::default_provider());
    let mut silent = client_config(provider, Arc::new(roots), vec![certificate], private_key, "test").expect("usable");
    silent.alpn_protocols.clear();
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("an address");
    let server = node(1);
    let serve = async {
        let (stream, _) = listener.accept().await.expect("a connection");
        server.accept(stream).await.map(|_| ()).map_err(|error| error.kind())
    };
    let call = async {
        let stream = TcpStream::connect(address).await.expect("a connection");
        let name = ServerName::try_from(DERIVED_NAME).expect("a name");
        TlsConnector::from(Arc::new(silent)).connect(name, stream).await.expect("TLS itself is well")
    };
    let (served, _open) = timeout(PATIENCE, async { tokio::join!(serve, call) }).await.expect("no side hangs");
    assert_eq!(served, Err(io::ErrorKind::InvalidData));
}

/// An authority as an operator would make it.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("an authority"))
    }

    /// Files of a certificate for `names`, made by way of `adapt`.
    fn files(&self, names: &[&str], adapt: impl FnOnce(&mut CertificateParams)) -> Files {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("names");
        adapt(&mut params);
        let key_pair = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key_pair, &self.0).expect("a certificate");
        Files::new(&certificate.pem(), &key_pair.serialize_pem(), &self.0.pem())
    }

    fn node(&self, names: &[&str], adapt: impl FnOnce(&mut CertificateParams)) -> PeerTls {
        self.files(names, adapt).load().expect("usable files")
    }
}

struct Files(TempDir);

impl Files {
    fn new(certificate: &str, private_key: &str, authority: &str) -> Self {
        let folder = TempDir::new().expect("a folder");
        for (name, text) in [("cert", certificate), ("key", private_key), ("ca", authority)] {
            fs::write(folder.path().join(name), text).expect("written");
        }
        Self(folder)
    }

    fn config(&self) -> Config {
        let path = |name: &str| Some(self.0.path().join(name));
        Config {
            peer_tls_cert_file: path("cert"),
            peer_tls_key_file: path("key"),
            peer_tls_ca_file: path("ca"),
            ..Config::default()
        }
    }

    fn load(&self) -> Result<PeerTls, PeerTlsError> {
        PeerTls::new(&self.config(), &key(1).into())
    }

    fn error(&self) -> String {
        with_causes(&self.load().err().expect("refused")).to_string()
    }
}

const NAME: &str = "outrigger.example.internal";

#[tokio::test]
async fn certificate_files_replace_the_derived_ones() {
    let authority = Authority::new();
    let (one, other) = (authority.node(&[NAME], |_| ()), authority.node(&["node-2.example", NAME], |_| ()));
    // `other` calls by its own first name, which `one` does not have; the other way round all is well.
    assert_talk(&one, &authority.node(&[NAME, "node-3.example"], |_| ())).await;
    assert_refused(&one, &other).await;
    assert_refused(&one, &node(1)).await;
    assert_refused(&node(1), &one).await;
}

#[tokio::test]
async fn replaced_files_count_and_unusable_ones_change_nothing() {
    let (before, after) = (Authority::new(), Authority::new());
    let files = before.files(&[NAME], |_| ());
    let (changing, keys) = (files.load().expect("usable files"), key(1).into());
    fs::write(files.0.path().join("cert"), "half a fi").expect("written");
    assert!(changing.replace(&files.config(), &keys).is_err());
    assert_talk(&changing, &before.node(&[NAME], |_| ())).await;
    let renewed = after.files(&[NAME], |_| ());
    changing.replace(&renewed.config(), &keys).expect("usable files");
    assert_talk(&changing, &after.node(&[NAME], |_| ())).await;
    assert_refused(&changing, &before.node(&[NAME], |_| ())).await;
    assert_eq!(*changing.revocations().borrow(), 1);
}

#[tokio::test]
async fn strangers_of_the_same_authority_are_refused() {
    let authority = Authority::new();
    let (ours, stranger) = (authority.node(&[NAME], |_| ()), authority.node(&["printer.example"], |_| ()));
    assert_refused(&ours, &stranger).await;
    assert_refused(&stranger, &ours).await;
    // One that believes our name, and has not got it.
    let files = authority.files(&["printer.example"], |_| ());
    let believing = Sides::new(&files.config(), &key(1).into()).expect("usable files");
    let believing = Sides { name: ServerName::try_from(NAME).expect("a name"), ..believing };
    assert_refused(&ours, &PeerTls::of(believing)).await;
}

#[tokio::test]
async fn foreign_expired_and_one_sided_certificates_are_refused() {
    let authority = Authority::new();
    let ours = authority.node(&[NAME], |_| ());
    let foreign = Authority::new().node(&[NAME], |_| ());
    assert_refused(&ours, &foreign).await;
    assert_refused(&foreign, &ours).await;
    let expired = authority.node(&[NAME], |params| params.not_after = date_time_ymd(2020, 1, 1));
    assert_refused(&ours, &expired).await;
    assert_refused(&expired, &ours).await;
    let future = authority.node(&[NAME], |params| params.not_before = date_time_ymd(3000, 1, 1));
    assert_refused(&ours, &future).await;
    let only_server = |params: &mut CertificateParams| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    };
    assert_refused(&ours, &authority.node(&[NAME], only_server)).await;
}

#[test]
fn unusable_files_are_named_by_their_key() {
    let authority = Authority::new();
    let files = || authority.files(&[NAME], |_| ());
    let with = |name: &str, text: &str| {
        let files = files();
        fs::write(files.0.path().join(name), text).expect("written");
        files.error()
    };
    assert!(with("cert", "").starts_with("peer_tls_cert_file: "), "{}", with("cert", ""));
    assert!(with("key", "no key").starts_with("peer_tls_key_file: "), "{}", with("key", "no key"));
    assert!(with("ca", "\n").starts_with("peer_tls_ca_file: "), "{}", with("ca", "\n"));
    let other_key = KeyPair::generate().expect("a key").serialize_pem();
    assert!(with("key", &other_key).contains("not usable"), "{}", with("key", &other_key));
    let large = "x".repeat(MAX_FILE_BYTES + 1);
    assert!(with("ca", &large).contains("larger"));
    let missing = files();
    fs::remove_file(missing.0.path().join("ca")).expect("removed");
    assert!(missing.error().starts_with("peer_tls_ca_file: "));
    let address = |params: &mut CertificateParams| {
        params.subject_alt_names = vec![SanType::IpAddress([127, 0, 0, 1].into())];
    };
    assert!(authority.files(&[], address).error().contains("needs a DNS name"));
    assert!(authority.files(&["*.example.internal"], |_| ()).error().contains("needs a DNS name"));
}

#[test]
fn every_node_derives_the_same_authority() {
    let der = |secret| derived_authority(&key(secret)).expect("an authority").der().clone();
    assert_eq!(der(1), der(1));
    assert_ne!(der(1), der(2));
}
