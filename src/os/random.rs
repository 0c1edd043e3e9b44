//! Random names and tokens from the kernel's generator.

use std::io;

/// Returns 128 random bits as 32 hexadecimal digits.
pub fn random_word() -> io::Result<String> {
    let mut random = [0; 16];
    getrandom::fill(&mut random).map_err(io::Error::other)?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}
