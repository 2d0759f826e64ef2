//! What the characters of one path segment say by themselves. A certain shape makes a segment a parameter
//! at once; everything else is a word until traffic shows otherwise (see `decide`).

/// Longest segment that can be a word, bytes.
pub const MAX_WORD: usize = 64;

/// Shape of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Shape {
    /// May be a word, or an id that looks like one.
    Word,
    /// Decimal digits.
    Int,
    /// RFC 9562, any version.
    Uuid,
    /// At least 8 hexadecimal digits, of both kinds.
    Hex,
    /// `2024-01-31`, alone or with a time behind it; `2024-01`, `2024-W05`.
    Date,
    /// `jo@example.org`.
    Email,
    /// Letters and digits as no language mixes them: base62, base64url, ULIDs, prefixed ids. Also what no
    /// name of a service has in it: spaces, quotes, lists, escapes.
    Id,
    /// Longer than [`MAX_WORD`].
    Long,
}

impl Shape {
    /// The parameter's name in a route.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Word | Self::Id => "{id}",
            Self::Int => "{int}",
            Self::Uuid => "{uuid}",
            Self::Hex => "{hex}",
            Self::Date => "{date}",
            Self::Email => "{email}",
            Self::Long => "{long}",
        }
    }

    /// The shape of a segment.
    #[must_use]
    pub fn of(segment: &str) -> Self {
        let bytes = segment.as_bytes();
        let len = bytes.len();
        if len > MAX_WORD {
            return Self::Long;
        }
        let digits = bytes.iter().filter(|b| b.is_ascii_digit()).count();
        if len > 0 && digits == len {
            return Self::Int;
        }
        if bytes[..len.min(1)] == *b"{" || is_version(bytes) {
            return Self::Word;
        }
        let hex = |b: &u8| b.is_ascii_hexdigit();
        let dashes = |at: &[usize]| at.iter().all(|&i| bytes.get(i) == Some(&b'-'));
        if len == 36 && dashes(&[8, 13, 18, 23]) && bytes.iter().filter(|b| hex(b)).count() == 32 {
            return Self::Uuid;
        }
        if is_date(bytes) {
            return Self::Date;
        }
        if let Some((name, host)) = segment.rsplit_once('@')
            && !name.is_empty()
            && host.contains('.')
        {
            return Self::Email;
        }
        if len >= 8 && digits >= 2 && bytes.iter().all(hex) {
            return Self::Hex;
        }
        if bytes.iter().any(|b| matches!(b, b' ' | b'%' | b'"' | b',' | b'|' | b'=' | b'+'))
            || bytes.first() == Some(&b'\'')
        {
            return Self::Id;
        }
        if is_mixed(bytes, digits) { Self::Id } else { Self::Word }
    }
}

/// `v1`, `v2.0`, `V3`, `v1beta2`, `2.0`: names of versions, never of objects.
#[must_use]
pub fn is_version(bytes: &[u8]) -> bool {
    let (rest, prefixed) = match bytes.split_first() {
        Some((b'v' | b'V', rest)) => (rest, true),
        _ => (bytes, false),
    };
    let number = rest.iter().take_while(|b| b.is_ascii_digit()).count();
    if number == 0 || number > 3 {
        return false;
    }
    match &rest[number..] {
        [] => prefixed,
        [b'.', minor @ ..] => minor.len() <= 5 && minor.iter().all(|b| b.is_ascii_digit() || *b == b'.'),
        tail => {
            prefixed && [&b"alpha"[..], b"beta", b"rc", b"p"].iter().any(|t| tail.starts_with(t)) && tail.len() <= 8
        }
    }
}

/// `2024-01-31`, `2024-01-31T10:00:00Z`, `2024-01`, `2024-W05` and the like.
fn is_date(bytes: &[u8]) -> bool {
    let digit = |i: usize| bytes.get(i).is_some_and(u8::is_ascii_digit);
    let dash = |i: usize| bytes.get(i) == Some(&b'-');
    if let [b'1', b'9', _, _, b'-', rest @ ..] | [b'2', b'0', _, _, b'-', rest @ ..] = bytes
        && [2, 3].into_iter().all(digit)
        && matches!(rest, [b'0', b'1'..=b'9'] | [b'1', b'0'..=b'2'] | [b'W', b'0'..=b'5', b'0'..=b'9'])
    {
        return true;
    }
    [0, 1, 2, 3, 5, 6, 8, 9].into_iter().all(digit)
        && dash(4)
        && dash(7)
        && (bytes.len() == 10 || matches!(bytes.get(10), Some(b'T' | b't' | b' ')))
}

/// Letters and digits in an order that words do not have.
fn is_mixed(bytes: &[u8], digits: usize) -> bool {
    let len = bytes.len();
    if len < 6 || !bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_')) {
        return false;
    }
    // A prefix of letters and a separator (`cus_…`, `order-…`) is passed over.
    let tail = bytes.iter().rposition(|b| matches!(b, b'-' | b'_')).map_or(bytes, |i| &bytes[i + 1..]);
    let longest = bytes.split(|b| matches!(b, b'-' | b'_')).max_by_key(|p| p.len()).unwrap_or(tail);
    let class = |b: u8| match b {
        b'0'..=b'9' => 0u8,
        b'A'..=b'Z' => 1,
        _ => 2,
    };
    let in_longest = longest.iter().filter(|b| b.is_ascii_digit()).count();
    let upper = longest.iter().filter(|b| b.is_ascii_uppercase()).count();
    let lower = longest.len() - in_longest - upper;
    // A capital behind a capital or small letter is how words are joined: `OrderItems`. A small letter behind a
    // digit or a digit between letters is not.
    let changes = longest
        .windows(2)
        .filter(|w| {
            class(w[0]) != class(w[1])
                && !(class(w[0]) == 2 && class(w[1]) == 1)
                && !(class(w[0]) == 1 && class(w[1]) == 2)
        })
        .count();
    let jumps = longest.windows(2).filter(|w| class(w[0]) != class(w[1])).count();
    if longest.len() >= LONG_WORD && (is_scrambled(longest, 6) || is_consonants(longest)) {
        return true;
    }
    match longest.len() {
        0..6 => false,
        // `k3x9q2`: digits on at least two sides.
        6..10 => in_longest >= 2 && changes >= 3 && (jumps >= 4 || upper == 0 || lower == 0),
        10..16 => in_longest >= 2 && (changes >= 3 || jumps >= 6),
        _ => in_longest >= 2 && (changes >= 2 || jumps >= 6) || (digits >= 6 && changes >= 1),
    }
}

/// Letters from which on a word says by its letters alone that it is none.
const LONG_WORD: usize = 16;

/// Capitals and small letters as no words are joined: they change places at least so many times, and there are about
/// as many of each.
pub fn is_scrambled(word: &[u8], changes: usize) -> bool {
    let upper = word.iter().filter(|b| b.is_ascii_uppercase()).count();
    let case = |w: &&[u8]| w[0].is_ascii_uppercase() != w[1].is_ascii_uppercase();
    let share = upper * 10 >= word.len() * 3 && upper * 10 <= word.len() * 7;
    share && word.windows(2).filter(case).count() >= changes
}

/// More consonants in a row than words have: six, in `catchphrase`.
fn is_consonants(word: &[u8]) -> bool {
    let vowel = |b: &u8| matches!(b, b'a' | b'e' | b'i' | b'o' | b'u' | b'y' | b'0'..=b'9');
    word.iter().all(|b| !b.is_ascii_uppercase()) && word.split(vowel).any(|run| run.len() > 6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ids_look_like() {
        for (segment, shape) in [
            ("42", Shape::Int),
            ("6fa459ea-ee8a-3ca4-894e-db77e160355e", Shape::Uuid),
            ("2024-01-31", Shape::Date),
            ("2024-01-31T10:00:00Z", Shape::Date),
            ("2024-01", Shape::Date),
            ("2024-W05", Shape::Date),
            ("sub_TfjkdoypNHnLvJVHWpcRmph", Shape::Id),
            ("cxwkxgirwnmdutnbqlhgilzgk", Shape::Id),
            ("jo@x.org", Shape::Email),
            ("deadbeef01", Shape::Hex),
            ("507f1f77bcf86cd799439011", Shape::Hex),
            ("cus_9sXk2LmQ8rT1", Shape::Id),
            ("01ARZ3NDEKTSV4RRFFQ69G5FAV", Shape::Id),
            ("dQw4w9WgXcQ7", Shape::Id),
            ("0ujtsYcgvSTl8PAuAdqWYSMnLOv", Shape::Id),
        ] {
            assert_eq!(Shape::of(segment), shape, "{segment}");
        }
        assert_eq!(Shape::of(&"x".repeat(65)), Shape::Long);
    }

    #[test]
    fn what_words_look_like() {
        for word in [
            "v1",
            "v10",
            "V2.1",
            "2.0",
            "v1beta1",
            "oauth2",
            "utf8",
            "s3",
            "http2",
            "base64",
            "OrderItems2",
            "top25random",
            "l3FirewallRules",
            "usRaceEthnicityZIP5",
            "projects-v1",
            "repository-settings",
            "getUserByID",
            "image-uint16",
            "admissionregistration.k8s.io",
            "generated-cvc2",
            "windowsPhone8",
            "ISO8601",
            "",
            "@me",
            "2fa-login",
            "2024-13",
            "getXMLHTTPRequestURL",
            "listAllOpenOrdersByUserId",
            "subscriptionschedules",
            "catchphrasesandsightscreens",
        ] {
            assert_eq!(Shape::of(word), Shape::Word, "{word}");
        }
    }
}
