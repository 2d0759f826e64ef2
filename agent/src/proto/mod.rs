//! Bytes of heads -> what an exchange needs of them. Nothing here fails: what cannot be read is left
//! out. **Invariant**: credentials, cookies, query values and bodies end here.

pub mod credential;
pub mod grpc;
pub mod hpack;
pub mod http1;
pub mod http2;
mod huffman;
mod memo;
mod texts;
