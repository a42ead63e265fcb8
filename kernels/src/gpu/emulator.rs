//! The emulated device.

use super::{DeviceError, Driver};

pub(super) fn open() -> Result<Box<dyn Driver>, DeviceError> {
    Err(DeviceError::Unavailable("this build has no emulator (feature `emulator`)".to_owned()))
}
