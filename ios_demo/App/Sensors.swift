import EdgeSD
import UIKit
import os

/// What this device says of itself, as a policy reads it. Read on the main actor, where UIDevice lives; kept for others.
@MainActor
final class Sensors {
    nonisolated let latest = Latest()

    init() {
        UIDevice.current.isBatteryMonitoringEnabled = true
        read()
        let names: [Notification.Name] = [
            ProcessInfo.thermalStateDidChangeNotification, .NSProcessInfoPowerStateDidChange,
            UIDevice.batteryLevelDidChangeNotification, UIDevice.batteryStateDidChangeNotification,
        ]
        for name in names {
            NotificationCenter.default.addObserver(forName: name, object: nil, queue: .main) { [weak self] _ in
                MainActor.assumeIsolated { self?.read() }
            }
        }
    }

    func read() {
        var state = DeviceState()
        let device = UIDevice.current, process = ProcessInfo.processInfo
        if device.batteryLevel >= 0 { state.battery = Double(device.batteryLevel) }
        switch device.batteryState {
        case .charging, .full: state.charging = true
        case .unplugged: state.charging = false
        default: break
        }
        state.saver = process.isLowPowerModeEnabled
        switch process.thermalState {
        case .nominal: state.thermal = "nominal"
        case .fair: state.thermal = "fair"
        case .serious: state.thermal = "serious"
        case .critical: state.thermal = "critical"
        @unknown default: break
        }
        latest.set(state)
    }

    /// The last reading, for the thread that draws; memory and clock are of the moment.
    final class Latest: @unchecked Sendable {
        private let lock = NSLock()
        private var state = DeviceState()

        func set(_ new: DeviceState) { lock.withLock { state = new } }

        func now() -> DeviceState {
            var now = lock.withLock { state }
            now.freeMemoryBytes = Double(os_proc_available_memory())
            now.timeS = ProcessInfo.processInfo.systemUptime
            return now
        }
    }
}
