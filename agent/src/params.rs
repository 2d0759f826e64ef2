//! Ids in a path -> keyed hashes. Detectors must tell objects apart without knowing them: of each
//! parameter of a route they get its kind, a 64-bit SipHash-1-3 under a secret key, and of a number the
//! value without its last ten bits (which of many neighbours it is stays unknown).
//!
//! Works on any template whose variable segments hold a `{…}`; `{rest}` at the end takes all that is left.
//! Source of the hash: Aumasson and Bernstein, "SipHash: a fast short-input PRF", 2012.

use std::hash::Hasher as _;

use siphasher::sip::SipHasher13;

/// Most parameters of a route that are told apart; later ones only change [`Params::object`].
pub const MAX_PARAMS: usize = 4;
/// Bits of a number that are left out.
pub const BUCKET_BITS: u32 = 10;

/// Hashes path parameters under one key.
#[derive(Clone)]
pub struct ParamHasher(SipHasher13);

/// One path parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Param {
    /// Its keyed hash.
    pub hash: u64,
    /// Of a decimal number, the value without its last [`BUCKET_BITS`] bits.
    pub bucket: Option<u64>,
}

/// The parameters of one path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Params {
    list: [Param; MAX_PARAMS],
    len: u8,
    /// Hash of all parameters together: the object that the path names. 0 when there is none.
    pub object: u64,
}

impl ParamHasher {
    /// With this key.
    #[must_use]
    pub fn new(key: [u8; 16]) -> Self {
        Self(SipHasher13::new_with_key(&key))
    }

    /// The parameters of `path` under its route.
    #[must_use]
    pub fn params(&self, path: &str, template: &str) -> Params {
        let mut params = Params::default();
        let (mut path, mut template) = (path.as_bytes(), template.as_bytes());
        if !template.contains(&b'{') {
            return params;
        }
        while let (Some(part), Some(segment)) = (next(&mut template), next(&mut path)) {
            if part.contains(&b'{') {
                self.add(&mut params, segment);
            }
            if template.iter().all(|&b| b == b'/') {
                while let Some(rest) = next(&mut path) {
                    self.add(&mut params, rest);
                }
            }
        }
        params
    }

    /// The parameters of a path that has this one number.
    #[must_use]
    pub fn number(&self, value: u64) -> Params {
        let mut params = Params::default();
        let mut hasher = self.0;
        hasher.write_u64(value);
        params.push(Param { hash: hasher.finish(), bucket: Some(value >> BUCKET_BITS) });
        params
    }

    fn add(&self, params: &mut Params, segment: &[u8]) {
        let mut hasher = self.0;
        hasher.write(segment);
        let digit = |n: u64, b: &u8| b.is_ascii_digit().then(|| n * 10 + u64::from(b - b'0'));
        // 19 digits fit.
        let number = if segment.len() <= 19 { segment.iter().try_fold(0, digit) } else { None };
        params.push(Param { hash: hasher.finish(), bucket: number.map(|n| n >> BUCKET_BITS) });
    }
}

/// Takes the next segment that is not empty. Segments are short: a loop beats a vector search.
fn next<'p>(path: &mut &'p [u8]) -> Option<&'p [u8]> {
    let start = path.iter().position(|&b| b != b'/')?;
    let rest = &path[start..];
    let (segment, after) = rest.split_at(rest.iter().position(|&b| b == b'/').unwrap_or(rest.len()));
    *path = after;
    Some(segment)
}

impl Params {
    /// Those that are told apart.
    #[must_use]
    pub fn list(&self) -> &[Param] {
        &self.list[..usize::from(self.len)]
    }

    /// The path names no object.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The same without neighbourhoods: as if no parameter were a number.
    #[must_use]
    pub fn opaque(mut self) -> Self {
        self.list.iter_mut().for_each(|p| p.bucket = None);
        self
    }

    fn push(&mut self, param: Param) {
        if let Some(free) = self.list.get_mut(usize::from(self.len)) {
            *free = param;
            self.len += 1;
        }
        self.object = self.object.rotate_left(23) ^ param.hash;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_told_apart_and_not_known() {
        let hasher = ParamHasher::new([3; 16]);
        let of = |path: &str| hasher.params(path, "/users/{int}/orders/{id}");
        assert_eq!(of("/users/42/orders/x"), of("/users/42/orders/x"));
        assert_ne!(of("/users/42/orders/x").object, of("/users/43/orders/x").object);
        assert_ne!(
            of("/users/42/orders/x").object,
            ParamHasher::new([4; 16]).params("/users/42/orders/x", "/users/{int}/orders/{id}").object
        );
        assert_eq!(of("/users/2048/orders/x").list()[0].bucket, Some(2));
        assert_eq!(of("/users/2048/orders/x").list()[1].bucket, None);
        assert!(hasher.params("/users/7", "/users/7").is_empty());
        assert_eq!(hasher.params("/f/a/b/c", "/f/{rest}").list().len(), 3);
        assert!(!format!("{:?}", of("/users/424242/orders/x")).contains("424242"));
    }

    proptest::proptest! {
        #[test]
        fn never_panics(path in ".{0,80}", template in "[/{}a]{0,20}") {
            let _ = ParamHasher::new([0; 16]).params(&path, &template);
        }
    }
}
