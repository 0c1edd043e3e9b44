//! Deserializes a configuration file without losing keys, duplicates or large numbers.

use std::fmt;

use serde::de::{Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

/// The options of a file, in its order. A key that occurs twice is an error.
pub(super) struct OptionsInFile(pub(super) Vec<(String, AnyValue)>);

impl<'de> Deserialize<'de> for OptionsInFile {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;

        impl<'de> Visitor<'de> for Pairs {
            type Value = OptionsInFile;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of options")
            }

            fn visit_none<E>(self) -> Result<OptionsInFile, E> {
                Ok(OptionsInFile(Vec::new()))
            }

            fn visit_unit<E>(self) -> Result<OptionsInFile, E> {
                Ok(OptionsInFile(Vec::new()))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<OptionsInFile, A::Error> {
                let mut pairs: Vec<(String, AnyValue)> = Vec::new();
                while let Some((key, value)) = map.next_entry::<String, AnyValue>()? {
                    if pairs.iter().any(|(known, _)| *known == key) {
                        return Err(A::Error::custom(format!("`{key}` is set twice")));
                    }
                    pairs.push((key, value));
                }
                Ok(OptionsInFile(pairs))
            }
        }

        deserializer.deserialize_any(Pairs)
    }
}

/// Any value of a file. Integers beyond 64 bits become strings, and maps become empty.
pub(super) struct AnyValue(pub(super) Value);

impl<'de> Deserialize<'de> for AnyValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = AnyValue;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }

            fn visit_none<E>(self) -> Result<AnyValue, E> {
                Ok(AnyValue(Value::Null))
            }

            fn visit_unit<E>(self) -> Result<AnyValue, E> {
                Ok(AnyValue(Value::Null))
            }

            fn visit_bool<E>(self, value: bool) -> Result<AnyValue, E> {
                Ok(AnyValue(value.into()))
            }

            fn visit_i64<E>(self, value: i64) -> Result<AnyValue, E> {
                Ok(AnyValue(value.into()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<AnyValue, E> {
                Ok(AnyValue(value.into()))
            }

            fn visit_i128<E>(self, value: i128) -> Result<AnyValue, E> {
                Ok(AnyValue(value.to_string().into()))
            }

            fn visit_u128<E>(self, value: u128) -> Result<AnyValue, E> {
                Ok(AnyValue(value.to_string().into()))
            }

            fn visit_f64<E>(self, value: f64) -> Result<AnyValue, E> {
                Ok(AnyValue(value.into()))
            }

            fn visit_str<E>(self, value: &str) -> Result<AnyValue, E> {
                Ok(AnyValue(value.into()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<AnyValue, A::Error> {
                let mut entries = Vec::new();
                while let Some(AnyValue(entry)) = list.next_element()? {
                    entries.push(entry);
                }
                Ok(AnyValue(Value::Array(entries)))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<AnyValue, A::Error> {
                // No option is a map, so the content is not needed. It may contain a secret.
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(AnyValue(Value::Object(Map::new())))
            }
        }

        deserializer.deserialize_any(Any)
    }
}
