//! `outrigger keys`: makes API keys, and lists those of the tenants file.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, bail};

use crate::tenancy::{NewKey, TenantsFile};

/// How much of a digest is shown.
const SHOWN_DIGITS: usize = 12;

/// Makes a key for this user. The key is in the text, and nowhere else.
pub fn new(organization: &str, user: &str, file: Option<&Path>) -> anyhow::Result<String> {
    let NewKey { key, digest } = NewKey::random().context("the operating system gives no random numbers")?;
    let known = file.map(TenantsFile::read).transpose()?.unwrap_or_default();
    let has_organization = known.organizations.iter().any(|known| known.id == organization);
    let has_user = known.users().any(|(of, known)| of == organization && known.id == user);
    let (organization_line, user_line) = (
        format!("[[organization]]\nid = {}\n", toml::Value::from(organization)),
        format!("  [[organization.user]]\n  id = {}\n", toml::Value::from(user)),
    );
    let key_lines = format!("    [[organization.user.key]]\n    sha256 = \"{digest}\"\n");
    // The ids must be valid as well.
    TenantsFile::parse(&[&*organization_line, &user_line, &key_lines].concat())?;
    let (place, lines) = match (has_organization, has_user) {
        (_, true) => (format!("below the user `{user}` of the organization `{organization}`"), key_lines),
        (true, false) => (format!("below the organization `{organization}`"), user_line + &key_lines),
        (false, false) => ("at the end".to_owned(), organization_line + &user_line + &key_lines),
    };
    Ok(format!("{key}\n\nThis key is shown only now. Its digest, for the tenants file, {place}:\n\n{lines}"))
}

/// All keys of the file, by the beginnings of their digests. Reports everything that is wrong with the file.
pub fn list(file: Option<&Path>) -> anyhow::Result<String> {
    let Some(file) = file else { bail!("no file to read: --tenants-file is missing") };
    let known = TenantsFile::read(file)?;
    let rows = known.users().flat_map(|(organization, user)| {
        let digests = user.keys.iter().map(|digest| digest.to_string()[..SHOWN_DIGITS].to_owned());
        let digests: Vec<String> = if user.keys.is_empty() { vec!["no key".to_owned()] } else { digests.collect() };
        digests.into_iter().map(move |digest| (format!("{organization}/{}", user.id), digest))
    });
    let rows: Vec<(String, String)> = rows.collect();
    let width = rows.iter().map(|(user, _)| user.len()).max().unwrap_or_default();
    let mut text = String::new();
    for (user, digest) in rows {
        writeln!(text, "{user:width$}  {digest}")?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tenancy::{Directory, KeyDigest};

    /// Follows the instructions: appends what the command prints, which is right for the user at the end of the file.
    fn follow(file: &Path, organization: &str, user: &str) -> String {
        let told = new(organization, user, Some(file)).expect("a key");
        let (key, rest) = told.split_once('\n').expect("lines");
        let lines = rest.rsplit_once(":\n\n").expect("what to write").1;
        let text = std::fs::read_to_string(file).expect("read");
        std::fs::write(file, text + lines).expect("written");
        key.to_owned()
    }

    #[test]
    fn what_is_printed_makes_the_key_valid() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("tenants.toml");
        std::fs::write(&file, "").expect("written");
        let keys = [("acme", "ana"), ("acme", "ana"), ("acme", "bob"), ("other", "ana")]
            .map(|(organization, user)| follow(&file, organization, user));
        let known = TenantsFile::read(&file).expect("valid");
        let directory = Directory::new(&[], Some(&known)).expect("valid");
        let tenants = keys.each_ref().map(|key| directory.holder(key).expect("known").tenant.to_string());
        assert_eq!(tenants, ["acme/ana", "acme/ana", "acme/bob", "other/ana"]);
        let listed = list(Some(&file)).expect("a list");
        let digest = KeyDigest::of(&keys[2]).to_string();
        assert_eq!(listed.lines().count(), 4);
        assert_eq!(listed.lines().nth(2), Some(&*format!("acme/bob   {}", &digest[..SHOWN_DIGITS])));
        assert!(keys.iter().all(|key| !listed.contains(key.as_str())));
    }

    #[test]
    fn ids_that_the_file_would_not_take_are_refused() {
        let error = new("a b", "ana", None).expect_err("a space").to_string();
        assert!(error.contains("organization 1: `id` must have"), "{error}");
        assert!(list(None).expect_err("no file").to_string().contains("--tenants-file"));
    }
}
