//! Limits that protect the parser from small job files that take much memory or time.

use std::fmt;

use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, IgnoredAny, MapAccess, SeqAccess,
    VariantAccess as _, Visitor,
};

/// Limit for the text of a file after the expansion of its aliases, in bytes.
pub(super) const MAX_EXPANDED: u64 = 128 * 1024 * 1024;

/// Limit for the nesting of brackets. The YAML scanner's time grows with its square.
pub(super) const MAX_NESTING: usize = 10_000;

/// Returns the largest number of brackets that are open at once. Counts those in strings and comments too,
/// where unclosed brackets are rare.
pub(super) fn deepest_nesting(text: &str) -> usize {
    let depths = text.bytes().scan(0_usize, |depth, byte| {
        match byte {
            b'[' | b'{' => *depth += 1,
            b']' | b'}' => *depth = depth.saturating_sub(1),
            _ => {}
        }
        Some(*depth)
    });
    depths.max().unwrap_or_default()
}

/// Returns whether the expansion of aliases makes `yaml` larger than [`MAX_EXPANDED`].
pub(super) fn expands_too_much(yaml: &str) -> bool {
    // Without anchors there are no aliases to expand.
    if !yaml.contains('&') {
        return false;
    }
    let mut left = Some(MAX_EXPANDED);
    // Other errors don't matter here: the actual parse reports them.
    let _ = Measure { left: &mut left }.deserialize(serde_yaml::Deserializer::from_str(yaml));
    left.is_none()
}

/// Visits a whole document without storing it. Once it has more than `left` bytes of text, sets `left` to
/// `None` and fails.
struct Measure<'a> {
    left: &'a mut Option<u64>,
}

impl<'de> DeserializeSeed<'de> for Measure<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<(), D::Error> {
        input.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Measure<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<(), E> {
        *self.left = self.left.and_then(|left| left.checked_sub(text.len() as u64));
        if self.left.is_some() { Ok(()) } else { Err(E::custom("too much text")) }
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_none<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while list.next_element_seed(Measure { left: self.left })?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while map.next_key_seed(Measure { left: self.left })?.is_some() {
            map.next_value_seed(Measure { left: self.left })?;
        }
        Ok(())
    }

    fn visit_enum<A: EnumAccess<'de>>(self, tagged: A) -> Result<(), A::Error> {
        let (IgnoredAny, value) = tagged.variant()?;
        value.newtype_variant_seed(self)
    }
}
