//! How the fields of raw options are read, and which there are.

use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::DockerSocket;
use crate::remote::log_artifact::UploadCondition;

/// Anything that is one word, as such or as text, as variables have it.
pub(super) fn flexible<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromText,
{
    struct Flexible<T>(std::marker::PhantomData<T>);

    impl<T: FromText> Visitor<'_> for Flexible<T> {
        type Value = Option<T>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str(T::EXPECTED)
        }

        fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
            let value = T::from_text(text);
            value.map(Some).ok_or_else(|| E::custom(format!("`{text}` is not {}", T::EXPECTED)))
        }

        fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<Self::Value, E> {
            self.visit_str(if value { "true" } else { "false" })
        }

        fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Self::Value, E> {
            self.visit_str(&value.to_string())
        }

        fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<Self::Value, E> {
            self.visit_str(&value.to_string())
        }

        fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Self::Value, E> {
            self.visit_str(&value.to_string())
        }

        fn visit_unit<E: serde::de::Error>(self) -> Result<Self::Value, E> {
            Ok(None)
        }
    }

    deserializer.deserialize_any(Flexible(std::marker::PhantomData))
}

/// What the text of a flag says.
pub(super) fn flag<T: FromText>(text: &str) -> Result<T, String> {
    T::from_text(text).ok_or_else(|| format!("it is not {}", T::EXPECTED))
}

/// A value that is one word.
pub(super) trait FromText: Sized {
    /// What it is, for people.
    const EXPECTED: &'static str;

    fn from_text(text: &str) -> Option<Self>;
}

impl FromText for bool {
    const EXPECTED: &'static str = "true or false";

    fn from_text(text: &str) -> Option<Self> {
        match text.to_ascii_lowercase().as_str() {
            "true" | "t" | "1" => Some(true),
            "false" | "f" | "0" => Some(false),
            _ => None,
        }
    }
}

impl FromText for u64 {
    const EXPECTED: &'static str = "a number of seconds from 0 to 4294967295";

    /// So few that they can be added to any time.
    fn from_text(text: &str) -> Option<Self> {
        text.parse::<u32>().ok().map(Self::from)
    }
}

impl FromText for u32 {
    const EXPECTED: &'static str = "the number of an open descriptor";

    fn from_text(text: &str) -> Option<Self> {
        text.parse().ok()
    }
}

impl FromText for UploadCondition {
    const EXPECTED: &'static str = "never, always or when-trimmed";

    fn from_text(text: &str) -> Option<Self> {
        <Self as clap::ValueEnum>::from_str(text, false).ok()
    }
}

impl FromText for DockerSocket {
    const EXPECTED: &'static str = "always or never";

    fn from_text(text: &str) -> Option<Self> {
        <Self as clap::ValueEnum>::from_str(text, false).ok()
    }
}

/// The keys that there are.
pub(super) fn known_keys<O: for<'de> Deserialize<'de>>() -> Vec<&'static str> {
    /// Takes nothing but the names of the fields.
    struct Fields<'a>(&'a mut Vec<&'static str>);

    impl<'de> Deserializer<'de> for Fields<'_> {
        type Error = serde::de::value::Error;

        fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
            visitor.visit_seq(NoElements)
        }

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            visitor: V,
        ) -> Result<V::Value, Self::Error> {
            self.0.extend(fields);
            self.deserialize_any(visitor)
        }

        serde::forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf
            option unit unit_struct newtype_struct seq tuple tuple_struct map enum identifier
            ignored_any
        }
    }

    struct NoElements;

    impl<'de> SeqAccess<'de> for NoElements {
        type Error = serde::de::value::Error;

        fn next_element_seed<T: serde::de::DeserializeSeed<'de>>(
            &mut self,
            _: T,
        ) -> Result<Option<T::Value>, Self::Error> {
            Ok(None)
        }
    }

    let mut keys = Vec::new();
    let _ = O::deserialize(Fields(&mut keys));
    keys
}
