//! Mutual TLS between nodes, and the certificates for it.
//!
//! A certificate is accepted if the cluster's authority signed it and it is valid for the cluster's name. Both sides check
//! this. Authority and name come from one of two sources:
//!
//! * the cluster keys: every node derives the same authority from each of them and issues a certificate to itself, signed by
//!   the authority of the first key. Its private key never leaves the process. There is nothing to distribute or renew.
//! * three files. The name is the first DNS name of the node's own certificate that is not a wildcard; the certificates of
//!   all nodes must have it. Addresses are not compared: gossip announces them, and nodes move. A certificate with extended
//!   key usages must have those for server and client.
//!
//! Both can be replaced while the node runs. New connections use the replacement. When an authority is removed,
//! `PeerTls::revocations` changes, and the owners of connections close them gracefully.
//!
//! Knows nothing of the traffic except that it is HTTP/2.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, PKCS_ED25519, date_time_ymd,
};
use rustls::client::danger::HandshakeSignatureValid;
use rustls::client::{Resumption, VerifierBuilderError, WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{
    AlertDescription, ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig,
    SignatureScheme,
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::config::Config;
use super::key::{ClusterKey, KeyRing};
use crate::types::watch;

/// The name for which derived certificates are valid.
const DERIVED_NAME: &str = "peer.outrigger.internal";
/// The protocol inside TLS.
const ALPN: &[u8] = b"h2";
/// Larger files are refused.
const MAX_FILE_BYTES: usize = 1 << 20;
/// An Ed25519 private key in PKCS #8 (RFC 8410) is this, followed by its 32 bytes.
const ED25519_PKCS8_HEAD: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];

#[derive(Debug, thiserror::Error)]
pub enum PeerTlsError {
    #[error("{key}: {path} cannot be read")]
    Unreadable {
        key: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{key}: {path} is larger than {MAX_FILE_BYTES} bytes")]
    TooLarge { key: &'static str, path: PathBuf },
    #[error("{key}: {path} is not a PEM file with the expected content")]
    Pem {
        key: &'static str,
        path: PathBuf,
        #[source]
        source: pem::Error,
    },
    #[error("{key}: {path} holds no certificate")]
    Empty { key: &'static str, path: PathBuf },
    #[error(
        "peer_tls_cert_file: the certificate needs a DNS name that the certificates of all nodes share (not a wildcard)"
    )]
    Nameless,
    #[error("{key}: the certificate or its key is not usable")]
    Unusable {
        key: &'static str,
        #[source]
        source: rustls::Error,
    },
    #[error("peer_tls_ca_file: the file does not hold usable authorities")]
    Untrusted(#[source] VerifierBuilderError),
    #[error("cluster_key_file: no certificate can be made from the key")]
    Mint(#[source] rcgen::Error),
}

/// A connection that this node made.
pub type CallingStream = client::TlsStream<TcpStream>;
/// A connection that a peer made.
pub type CalledStream = server::TlsStream<TcpStream>;

/// This node's TLS configuration, for calls to peers and from peers. Cheap to clone; clones change together.
#[derive(Clone)]
pub struct PeerTls(Arc<CurrentTls>);

struct CurrentTls {
    sides: ArcSwap<Sides>,
    /// Counts the times that something was no longer trusted.
    revocations: watch::Sender<u64>,
}

struct Sides {
    acceptor: TlsAcceptor,
    connector: TlsConnector,
    name: ServerName<'static>,
    /// In DER.
    authorities: Vec<CertificateDer<'static>>,
}

impl PeerTls {
    /// Reads the certificate files if they are configured, else derives certificates from the cluster keys.
    pub fn new(config: &Config, keys: &KeyRing) -> Result<Self, PeerTlsError> {
        Ok(Self::of(Sides::new(config, keys)?))
    }

    /// Issues a new certificate, signed by the authority that every holder of the first key derives.
    pub fn from_keys(keys: &KeyRing) -> Result<Self, PeerTlsError> {
        Ok(Self::of(Sides::from_keys(keys)?))
    }

    fn of(sides: Sides) -> Self {
        let shared = CurrentTls { sides: ArcSwap::from_pointee(sides), revocations: watch::Sender::new(0) };
        Self(Arc::new(shared))
    }

    /// Reads the files again, or takes the keys. After an error everything stays as it was.
    pub fn replace(&self, config: &Config, keys: &KeyRing) -> Result<(), PeerTlsError> {
        let sides = Sides::new(config, keys)?;
        let before = self.0.sides.swap(Arc::new(sides));
        let now = self.0.sides.load();
        if before.authorities.iter().any(|authority| !now.authorities.contains(authority)) {
            let count = *self.0.revocations.borrow();
            self.0.revocations.send_replace(count + 1);
        }
        Ok(())
    }

    /// Changes when an authority is no longer trusted.
    pub fn revocations(&self) -> watch::Receiver<u64> {
        self.0.revocations.subscribe()
    }

    /// The server's side of the handshake. It has no time limit of its own.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<CalledStream> {
        let acceptor = self.0.sides.load().acceptor.clone();
        let stream = acceptor.accept(stream).await?;
        speaks_http2(stream.get_ref().1.alpn_protocol())?;
        Ok(stream)
    }

    /// The client's side of the handshake. It has no time limit of its own. If the peer refuses this node's certificate, that
    /// shows only at the first read (TLS 1.3).
    pub async fn connect(&self, stream: TcpStream) -> io::Result<CallingStream> {
        let (connector, name) = {
            let sides = self.0.sides.load();
            (sides.connector.clone(), sides.name.clone())
        };
        let stream = connector.connect(name, stream).await?;
        speaks_http2(stream.get_ref().1.alpn_protocol())?;
        Ok(stream)
    }
}

/// Whether the error, or one behind it, says that one side does not believe the other's certificate.
pub fn is_distrust(error: &(dyn std::error::Error + 'static)) -> bool {
    let of_io = |error: &io::Error| {
        let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        inner.is_some_and(|error| match error {
            rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented => true,
            rustls::Error::AlertReceived(alert) => matches!(
                alert,
                AlertDescription::BadCertificate
                    | AlertDescription::UnsupportedCertificate
                    | AlertDescription::CertificateRevoked
                    | AlertDescription::CertificateExpired
                    | AlertDescription::CertificateUnknown
                    | AlertDescription::UnknownCA
                    | AlertDescription::AccessDenied
                    | AlertDescription::DecryptError
                    | AlertDescription::CertificateRequired
            ),
            _ => false,
        })
    };
    let mut next = Some(error);
    while let Some(error) = next {
        let shared = error.downcast_ref::<Arc<io::Error>>().map(AsRef::as_ref);
        if error.downcast_ref::<io::Error>().or(shared).is_some_and(of_io) {
            return true;
        }
        next = error.source();
    }
    false
}

impl Sides {
    fn new(config: &Config, keys: &KeyRing) -> Result<Self, PeerTlsError> {
        match (&config.peer_tls_cert_file, &config.peer_tls_key_file, &config.peer_tls_ca_file) {
            (Some(certificate), Some(private_key), Some(authority)) => {
                Self::from_files(certificate, private_key, authority)
            }
            _ => Self::from_keys(keys),
        }
    }

    fn from_keys(keys: &KeyRing) -> Result<Self, PeerTlsError> {
        let authorities = keys.iter().map(derived_authority).collect::<Result<Vec<_>, _>>();
        let authorities = authorities.map_err(PeerTlsError::Mint)?;
        let (certificate, private_key) = mint(&authorities[0]).map_err(PeerTlsError::Mint)?;
        Identity {
            chain: vec![certificate],
            private_key,
            authorities: authorities.iter().map(|authority| authority.der().clone()).collect(),
            name: ServerName::try_from(DERIVED_NAME).expect("a DNS name"),
            keys: ["cluster_key_file"; 2],
        }
        .into_sides()
    }

    /// PEM files: the chain of this node's certificate, its private key, and the authorities of the cluster.
    fn from_files(certificate: &Path, private_key: &Path, authority: &Path) -> Result<Self, PeerTlsError> {
        let chain = read_certificates("peer_tls_cert_file", certificate)?;
        let key = "peer_tls_key_file";
        let private_key = PrivateKeyDer::from_pem_slice(&read(key, private_key)?)
            .map_err(|source| PeerTlsError::Pem { key, path: private_key.to_owned(), source })?;
        let authorities = read_certificates("peer_tls_ca_file", authority)?;
        let name = shared_name(&chain[0])?;
        Identity { chain, private_key, authorities, name, keys: ["peer_tls_cert_file", "peer_tls_ca_file"] }
            .into_sides()
    }
}

fn speaks_http2(protocol: Option<&[u8]>) -> io::Result<()> {
    if protocol != Some(ALPN) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the other side does not speak HTTP/2"));
    }
    Ok(())
}

/// This node's certificate, and the authorities that it trusts.
struct Identity {
    /// Its own certificate first.
    chain: Vec<CertificateDer<'static>>,
    private_key: PrivateKeyDer<'static>,
    authorities: Vec<CertificateDer<'static>>,
    name: ServerName<'static>,
    /// The configuration keys behind the chain and the authorities.
    keys: [&'static str; 2],
}

impl Identity {
    fn into_sides(self) -> Result<Sides, PeerTlsError> {
        let [chain_key, authority_key] = self.keys;
        let unusable = |key| move |source| PeerTlsError::Unusable { key, source };
        let mut roots = RootCertStore::empty();
        for authority in &self.authorities {
            roots.add(authority.clone()).map_err(unusable(authority_key))?;
        }
        let roots = Arc::new(roots);
        // Named here because the process may have another default provider, or none.
        let provider = Arc::new(ring::default_provider());

        let chain_verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(PeerTlsError::Untrusted)?;
        let verifier = NamedClientVerifier { chain_verifier, name: self.name.clone() };
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .map_err(unusable(chain_key))?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_single_cert(self.chain.clone(), self.private_key.clone_key())
            .map_err(unusable(chain_key))?;
        server.alpn_protocols = vec![ALPN.to_vec()];
        // Connections live as long as the nodes, so there is no session resumption: every handshake checks the certificate.
        server.send_tls13_tickets = 0;

        let client = client_config(provider, roots, self.chain, self.private_key, chain_key)?;
        Ok(Sides {
            acceptor: TlsAcceptor::from(Arc::new(server)),
            connector: TlsConnector::from(Arc::new(client)),
            name: self.name,
            authorities: self.authorities,
        })
    }
}

fn client_config(
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    private_key: PrivateKeyDer<'static>,
    key: &'static str,
) -> Result<ClientConfig, PeerTlsError> {
    let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider.clone())
        .build()
        .map_err(PeerTlsError::Untrusted)?;
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(|source| PeerTlsError::Unusable { key, source })?
        .with_webpki_verifier(verifier)
        .with_client_auth_cert(chain, private_key)
        .map_err(|source| PeerTlsError::Unusable { key, source })?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// rustls checks the name only of servers. This checks it for clients as well.
#[derive(Debug)]
struct NamedClientVerifier {
    chain_verifier: Arc<dyn ClientCertVerifier>,
    name: ServerName<'static>,
}

impl ClientCertVerifier for NamedClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain_verifier.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.chain_verifier.verify_client_cert(certificate, intermediates, now)?;
        verify_server_name(&ParsedCertificate::try_from(certificate)?, &self.name)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain_verifier.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain_verifier.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain_verifier.supported_verify_schemes()
    }
}

/// The authority's certificate is the same on every node: an Ed25519 signature is a function of key and message.
fn derived_authority(key: &ClusterKey) -> Result<CertifiedIssuer<'static, KeyPair>, rcgen::Error> {
    let pkcs8 = [&ED25519_PKCS8_HEAD[..], &key.derive("peer ca")].concat();
    let key_pair = KeyPair::from_pkcs8_der_and_sign_algo(&PrivatePkcs8KeyDer::from(pkcs8), &PKCS_ED25519)?;
    let mut params = timeless(CertificateParams::default());
    params.distinguished_name.push(DnType::CommonName, "outrigger cluster");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    CertifiedIssuer::self_signed(params, key_pair)
}

/// A certificate with a fresh key.
fn mint(
    authority: &CertifiedIssuer<'static, KeyPair>,
) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>), rcgen::Error> {
    let key_pair = KeyPair::generate_for(&PKCS_ED25519)?;
    let mut params = timeless(CertificateParams::new([DERIVED_NAME.to_owned()])?);
    params.distinguished_name.push(DnType::CommonName, "outrigger node");
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let certificate = params.signed_by(&key_pair, authority)?;
    Ok((certificate.der().clone(), PrivatePkcs8KeyDer::from(key_pair.serialize_der()).into()))
}

/// Valid at all times. The key of an issued certificate lives no longer than its process and is worth no more than the
/// cluster key beside it. An expiry date would protect nobody; it could only cut off a node that runs for long or whose
/// clock is wrong.
fn timeless(params: CertificateParams) -> CertificateParams {
    let mut params = params;
    (params.not_before, params.not_after) = (date_time_ymd(1975, 1, 1), date_time_ymd(4096, 1, 1));
    params
}

/// The first DNS name that is not a wildcard.
fn shared_name(certificate: &CertificateDer<'_>) -> Result<ServerName<'static>, PeerTlsError> {
    let parsed = webpki::EndEntityCert::try_from(certificate).map_err(|_| PeerTlsError::Nameless)?;
    let mut names = parsed.valid_dns_names().filter_map(|name| ServerName::try_from(name.to_owned()).ok());
    names.next().ok_or(PeerTlsError::Nameless)
}

fn read(key: &'static str, path: &Path) -> Result<Vec<u8>, PeerTlsError> {
    let bytes =
        std::fs::read(path).map_err(|source| PeerTlsError::Unreadable { key, path: path.to_owned(), source })?;
    if bytes.len() > MAX_FILE_BYTES {
        return Err(PeerTlsError::TooLarge { key, path: path.to_owned() });
    }
    Ok(bytes)
}

/// At least one.
fn read_certificates(key: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, PeerTlsError> {
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&read(key, path)?)
        .collect::<Result<_, _>>()
        .map_err(|source| PeerTlsError::Pem { key, path: path.to_owned(), source })?;
    if certificates.is_empty() {
        return Err(PeerTlsError::Empty { key, path: path.to_owned() });
    }
    Ok(certificates)
}

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;
