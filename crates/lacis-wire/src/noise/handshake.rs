//! The two messages of the IK handshake, client's and server's side.

use snow::{Builder, HandshakeState};

use super::{
    HEADER_LEN, INITIATION_LEN, NoiseError, Opener, RESPONSE_LEN, Sealer, TYPE_ERROR, TYPE_INITIATION,
    TYPE_RESPONSE, error_text,
};
use crate::key::{KEY_LEN, MachineKey, MachinePrivateKey, diffie_hellman};

const PROTOCOL: &str = "Noise_IK_25519_ChaChaPoly_BLAKE2s";
const PROLOGUE: &str = "Tailscale Control Protocol v";
/// Version, type and length: only the initiation has a header of five bytes.
const INITIATION_HEADER: usize = 5;

/// A finished handshake: who is at the other end, and the keys of both directions.
#[derive(Debug)]
pub struct Session {
    /// The other side's static key, proven by the handshake.
    pub peer: MachineKey,
    /// The capability version of the initiation.
    pub version: u16,
    /// Binds other things to this session.
    pub handshake_hash: [u8; 32],
    /// Seals what this side sends.
    pub sealer: Sealer,
    /// Opens what the other side sends.
    pub opener: Opener,
}

fn builder<'a>(
    private: &'a [u8; KEY_LEN],
    prologue: &'a str,
    ephemeral: Option<&'a [u8; KEY_LEN]>,
) -> Result<Builder<'a>, NoiseError> {
    let params = PROTOCOL.parse().map_err(NoiseError::Handshake)?;
    let mut builder = Builder::new(params)
        .prologue(prologue.as_bytes())
        .and_then(|b| b.local_private_key(private))
        .map_err(NoiseError::Handshake)?;
    if let Some(key) = ephemeral {
        builder = builder.fixed_ephemeral_key_for_testing_only(key);
    }
    Ok(builder)
}

fn prologue(version: u16) -> String {
    format!("{PROLOGUE}{version}")
}

/// Refuses a public key with which X25519 gives zero, which snow itself does not look at.
///
/// Such a point gives zero with every clamped private key, so one multiplication with ours tells.
fn refuse_low_order(
    private: &[u8; KEY_LEN],
    public: &[u8],
    which: &'static str,
) -> Result<[u8; KEY_LEN], NoiseError> {
    let public: [u8; KEY_LEN] = public.try_into().map_err(|_| NoiseError::LowOrder(which))?;
    match diffie_hellman(private, &public) {
        Some(_) => Ok(public),
        None => Err(NoiseError::LowOrder(which)),
    }
}

fn session(mut state: HandshakeState, peer: MachineKey, version: u16, client: bool) -> Session {
    let mut handshake_hash = [0; 32];
    handshake_hash.copy_from_slice(state.get_handshake_hash());
    let (client_to_server, server_to_client) = state.dangerously_get_raw_split();
    let (seal, open) =
        if client { (client_to_server, server_to_client) } else { (server_to_client, client_to_server) };
    Session { peer, version, handshake_hash, sealer: Sealer::new(&seal), opener: Opener::new(&open) }
}

/// The client's side, waiting for the server's response.
#[derive(Debug)]
pub struct Initiator {
    state: HandshakeState,
    private: MachinePrivateKey,
    server: MachineKey,
    version: u16,
}

impl Initiator {
    /// Starts a handshake with the server that has the key `server`; gives the frame to send.
    pub fn new(
        private: &MachinePrivateKey,
        server: &MachineKey,
        version: u16,
    ) -> Result<(Self, [u8; INITIATION_LEN]), NoiseError> {
        Self::start(private, server, version, None)
    }

    fn start(
        private: &MachinePrivateKey,
        server: &MachineKey,
        version: u16,
        ephemeral: Option<&[u8; KEY_LEN]>,
    ) -> Result<(Self, [u8; INITIATION_LEN]), NoiseError> {
        let bytes = private.to_bytes();
        refuse_low_order(&bytes, server.as_bytes(), "static")?;
        let prologue = prologue(version);
        let mut state = builder(&bytes, &prologue, ephemeral)?
            .remote_public_key(server.as_bytes())
            .and_then(Builder::build_initiator)
            .map_err(NoiseError::Handshake)?;
        let mut frame = [0; INITIATION_LEN];
        frame[..2].copy_from_slice(&version.to_be_bytes());
        frame[2] = TYPE_INITIATION;
        frame[3..INITIATION_HEADER]
            .copy_from_slice(&((INITIATION_LEN - INITIATION_HEADER) as u16).to_be_bytes());
        state.write_message(&[], &mut frame[INITIATION_HEADER..]).map_err(NoiseError::Handshake)?;
        let initiator = Self { state, private: private.clone(), server: *server, version };
        Ok((initiator, frame))
    }

    /// How many bytes of the server's answer are still needed before [`Self::finish`] can judge it.
    ///
    /// A response has 51 bytes; an error frame says its own length.
    pub fn response_len(start: &[u8]) -> usize {
        match start {
            [TYPE_ERROR, high, low, ..] => {
                HEADER_LEN + usize::from(u16::from_be_bytes([*high, *low])).min(super::MAX_FRAME)
            }
            [TYPE_ERROR, ..] => HEADER_LEN,
            _ => RESPONSE_LEN,
        }
    }

    /// Checks the server's answer and gives the session.
    pub fn finish(mut self, frame: &[u8]) -> Result<Session, NoiseError> {
        match frame {
            [TYPE_ERROR, _, _, body @ ..] => return Err(NoiseError::Refused(error_text(body))),
            [TYPE_RESPONSE, high, low, ..] => {
                let length = usize::from(u16::from_be_bytes([*high, *low]));
                if frame.len() != RESPONSE_LEN || length != RESPONSE_LEN - HEADER_LEN {
                    return Err(NoiseError::FrameLength { frame: "response", found: length + HEADER_LEN });
                }
            }
            [found, _, _, ..] => {
                return Err(NoiseError::FrameType { wanted: "response", found: *found });
            }
            short => {
                return Err(NoiseError::FrameLength { frame: "response", found: short.len() });
            }
        }
        let message = &frame[HEADER_LEN..];
        refuse_low_order(&self.private.to_bytes(), &message[..KEY_LEN], "ephemeral")?;
        self.state.read_message(message, &mut []).map_err(NoiseError::Handshake)?;
        Ok(session(self.state, self.server, self.version, true))
    }
}

/// The server's side, having read a client's initiation.
#[derive(Debug)]
pub struct Responder {
    state: HandshakeState,
    machine: MachineKey,
    version: u16,
}

impl Responder {
    /// Reads a client's initiation with the server's private key.
    ///
    /// After this the client's machine key is proven (but the initiation may be a replay until the
    /// first record opens).
    pub fn read(private: &MachinePrivateKey, frame: &[u8]) -> Result<Self, NoiseError> {
        Self::start(private, frame, None)
    }

    fn start(
        private: &MachinePrivateKey,
        frame: &[u8],
        ephemeral: Option<&[u8; KEY_LEN]>,
    ) -> Result<Self, NoiseError> {
        let wrong_length = NoiseError::FrameLength { frame: "initiation", found: frame.len() };
        let frame: &[u8; INITIATION_LEN] = frame.try_into().map_err(|_| wrong_length)?;
        if frame[2] != TYPE_INITIATION {
            return Err(NoiseError::FrameType { wanted: "initiation", found: frame[2] });
        }
        let length = usize::from(u16::from_be_bytes([frame[3], frame[4]]));
        if length != INITIATION_LEN - INITIATION_HEADER {
            return Err(NoiseError::FrameLength { frame: "initiation", found: length + INITIATION_HEADER });
        }
        let version = u16::from_be_bytes([frame[0], frame[1]]);
        let message = &frame[INITIATION_HEADER..];
        let bytes = private.to_bytes();
        refuse_low_order(&bytes, &message[..KEY_LEN], "ephemeral")?;
        let prologue = prologue(version);
        let mut state =
            builder(&bytes, &prologue, ephemeral)?.build_responder().map_err(NoiseError::Handshake)?;
        state.read_message(message, &mut []).map_err(NoiseError::Handshake)?;
        let machine = state.get_remote_static().ok_or(NoiseError::LowOrder("static"))?;
        let machine = MachineKey::from_bytes(refuse_low_order(&bytes, machine, "static")?);
        Ok(Self { state, machine, version })
    }

    /// The client's machine key.
    pub fn machine(&self) -> MachineKey {
        self.machine
    }

    /// The client's capability version.
    pub fn version(&self) -> u16 {
        self.version
    }

    /// Makes the response frame and the session.
    pub fn respond(mut self) -> Result<([u8; RESPONSE_LEN], Session), NoiseError> {
        let mut frame = [0; RESPONSE_LEN];
        frame[0] = TYPE_RESPONSE;
        frame[1..HEADER_LEN].copy_from_slice(&((RESPONSE_LEN - HEADER_LEN) as u16).to_be_bytes());
        self.state.write_message(&[], &mut frame[HEADER_LEN..]).map_err(NoiseError::Handshake)?;
        let session = session(self.state, self.machine, self.version, false);
        Ok((frame, session))
    }
}

/// An error frame: what a server sends instead of a response to say why not. Unauthenticated.
pub fn error_frame(text: &str) -> Vec<u8> {
    let text = &text.as_bytes()[..text.len().min(super::MAX_ERROR_TEXT)];
    let mut frame = Vec::with_capacity(HEADER_LEN + text.len());
    frame.push(TYPE_ERROR);
    frame.extend_from_slice(&(text.len() as u16).to_be_bytes());
    frame.extend_from_slice(text);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const INITIATION: &str = "00710100605dfedd3b6bd47f6fa28ee15d969d5bb0ea53774d488bdaf9df1c6e\
        0124b3ef22e7e00fca1f8146f01b0be0912230bc1a3ddb89daa2a5b15f9a771c\
        0f98278223a2dae08fc4479d020ebea65294c09b53d7e336d500db5fb0475d4b\
        944b930a23";
    const RESPONSE: &str = "020030ac01b2209e86354fb853237b5de0f4fab13c7fcbf433a61c019369617f\
        ecf10b97360d496b1885a0dd15c3f806be8465";

    fn server_key() -> MachinePrivateKey {
        MachinePrivateKey::from_bytes([1; 32])
    }

    fn client_key() -> MachinePrivateKey {
        MachinePrivateKey::from_bytes([2; 32])
    }

    fn vector() -> (Session, Session) {
        let (initiator, initiation) =
            Initiator::start(&client_key(), &server_key().public(), 113, Some(&[3; 32])).unwrap();
        assert_eq!(hex::encode(initiation), INITIATION);
        let responder = Responder::start(&server_key(), &initiation, Some(&[4; 32])).unwrap();
        assert_eq!(responder.version(), 113);
        assert_eq!(responder.machine(), client_key().public());
        let (response, server) = responder.respond().unwrap();
        assert_eq!(hex::encode(response), RESPONSE);
        (initiator.finish(&response).unwrap(), server)
    }

    #[test]
    fn the_published_vector_is_reproduced_byte_for_byte() {
        let (mut client, mut server) = vector();
        let hash = "7019a24168b8ace77354335110b6448d540a57d0a99decef50db64ebdee54224";
        assert_eq!(hex::encode(client.handshake_hash), hash);
        assert_eq!(hex::encode(server.handshake_hash), hash);
        let mut wire = Vec::new();
        client.sealer.seal(b"hello", &mut wire).unwrap();
        client.sealer.seal(b"world", &mut wire).unwrap();
        assert_eq!(
            hex::encode(&wire),
            "040015a4990e2c89173b569fc5607ed50c4d4095fc20e0fc\
             0400158f94453246bd0fa409cb472ae964a50e1e7ce9a027"
        );
        let mut wire = Vec::new();
        server.sealer.seal(b"hello", &mut wire).unwrap();
        assert_eq!(hex::encode(&wire), "04001556de83acb9c392b9e1cbbf11f2748ab74546f9b89e");
        let range = client.opener.open(&mut wire).unwrap();
        assert_eq!(&wire[range], b"hello");
    }

    #[test]
    fn the_split_keys_are_those_of_the_vector() {
        let (initiator, initiation) =
            Initiator::start(&client_key(), &server_key().public(), 113, Some(&[3; 32])).unwrap();
        let responder = Responder::start(&server_key(), &initiation, Some(&[4; 32])).unwrap();
        let (response, _) = responder.respond().unwrap();
        let mut state = initiator.state;
        state.read_message(&response[HEADER_LEN..], &mut []).unwrap();
        let (one, two) = state.dangerously_get_raw_split();
        assert_eq!(hex::encode(one), "4441bbb14dc71c3129a719c8997891dd4f01b79d0281c6b6b76acb506ef2716e");
        assert_eq!(hex::encode(two), "76cc4cab00b32c813aad94ff9c6290f10afc0d11ec4bfcae48b157e2a533ff7a");
    }

    #[test]
    fn another_server_key_is_refused() {
        let (_, initiation) = Initiator::new(&client_key(), &server_key().public(), 113).unwrap();
        let other = MachinePrivateKey::generate();
        assert!(matches!(Responder::read(&other, &initiation), Err(NoiseError::Handshake(_))));
    }

    #[test]
    fn a_changed_version_is_refused_because_the_prologue_binds_it() {
        let (_, mut initiation) = Initiator::new(&client_key(), &server_key().public(), 113).unwrap();
        initiation[1] = 114;
        assert!(Responder::read(&server_key(), &initiation).is_err());
    }

    #[test]
    fn low_order_keys_are_refused_on_both_sides() {
        let zero = MachineKey::default();
        assert!(matches!(Initiator::new(&client_key(), &zero, 113), Err(NoiseError::LowOrder("static"))));
        let mut initiation = [0; INITIATION_LEN];
        initiation[1] = 113;
        initiation[2] = 1;
        initiation[4] = 96;
        assert!(matches!(
            Responder::read(&server_key(), &initiation),
            Err(NoiseError::LowOrder("ephemeral"))
        ));
        let (initiator, _) = Initiator::new(&client_key(), &server_key().public(), 113).unwrap();
        let mut response = [0; RESPONSE_LEN];
        response[0] = 2;
        response[2] = 48;
        assert!(matches!(initiator.finish(&response), Err(NoiseError::LowOrder("ephemeral"))));
    }

    #[test]
    fn an_error_frame_gives_its_text() {
        let (initiator, _) = Initiator::new(&client_key(), &server_key().public(), 113).unwrap();
        let frame = error_frame("go\naway");
        assert_eq!(Initiator::response_len(&frame[..3]), frame.len());
        assert_eq!(
            initiator.finish(&frame).unwrap_err().to_string(),
            "the other side refused the Noise handshake: go away"
        );
    }

    proptest! {
        #[test]
        fn a_flipped_bit_is_always_refused(position in 0..INITIATION_LEN * 8) {
            let (_, mut initiation) =
                Initiator::new(&client_key(), &server_key().public(), 113).unwrap();
            initiation[position / 8] ^= 1 << (position % 8);
            // The top bit of an X25519 public key has no meaning for the multiplication, but the
            // hash covers it.
            prop_assert!(Responder::read(&server_key(), &initiation).is_err());
        }

        #[test]
        fn a_flipped_bit_in_the_response_is_always_refused(position in 0..RESPONSE_LEN * 8) {
            let (initiator, initiation) =
                Initiator::new(&client_key(), &server_key().public(), 113).unwrap();
            let (mut response, _) =
                Responder::read(&server_key(), &initiation).unwrap().respond().unwrap();
            response[position / 8] ^= 1 << (position % 8);
            prop_assert!(initiator.finish(&response).is_err());
        }

        #[test]
        fn no_bytes_make_a_side_panic(bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
            let _ = Responder::read(&server_key(), &bytes);
            let (initiator, _) = Initiator::new(&client_key(), &server_key().public(), 113).unwrap();
            let _ = Initiator::response_len(&bytes);
            let _ = initiator.finish(&bytes);
        }
    }
}
