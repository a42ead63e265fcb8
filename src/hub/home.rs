//! The default folder for downloads.

use std::ffi::OsString;
use std::path::PathBuf;

/// `$OUTRIGGER_HOME`, else `outrigger` in the XDG cache folder. `variable` reads the environment. `None` if no variable
/// names a home.
pub fn default_home(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let directory = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    // The XDG specification says to ignore relative paths.
    let cache = directory("XDG_CACHE_HOME").filter(|path| path.is_absolute());
    let cache = cache.or_else(|| Some(directory("HOME")?.join(".cache")));
    directory("OUTRIGGER_HOME").or_else(|| Some(cache?.join("outrigger")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn home(variables: &[(&str, &str)]) -> Option<PathBuf> {
        default_home(|name| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into()))
    }

    #[test]
    fn the_nearest_variable_decides() {
        let (own, cache, user) = (("OUTRIGGER_HOME", "/o"), ("XDG_CACHE_HOME", "/c"), ("HOME", "/h"));
        assert_eq!(home(&[user, cache, own]), Some("/o".into()));
        assert_eq!(home(&[user, cache]), Some("/c/outrigger".into()));
        assert_eq!(home(&[user]), Some("/h/.cache/outrigger".into()));
        assert_eq!(home(&[user, ("XDG_CACHE_HOME", "relative")]), Some("/h/.cache/outrigger".into()));
        assert_eq!(home(&[user, ("OUTRIGGER_HOME", "")]), Some("/h/.cache/outrigger".into()));
        assert_eq!(home(&[]), None);
    }
}
